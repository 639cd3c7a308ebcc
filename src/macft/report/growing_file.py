"""The lines of a file that another process appends to."""

from __future__ import annotations

import os
from pathlib import Path

_AT_ONCE_BYTES = 8 * 2**20
_LONGEST_LINE = 4 * 2**20


class GrowingFile:
    """Reads the lines of ``path`` as they come. A line counts once its end is there.

    Attributes:
        incarnation: Counts the files that have been at ``path``: a resumed run writes its metrics file anew. The lines
            then come from the beginning.
    """

    def __init__(self, path: Path):
        self.incarnation = 0
        self._path = path
        self._file = 0
        self._at, self._rest = 0, b""

    def read(self) -> list[bytes]:
        """The next lines, without their ends: those that have come since the last call, or the first MBs of many.

        None where there is no file. Raises OSError where it can't be read.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self._file != status.st_ino or status.st_size < self._at:
                    self.incarnation += 1
                    self._file, self._at, self._rest = status.st_ino, 0, b""
                file.seek(self._at)
                data = file.read(_AT_ONCE_BYTES)
        except FileNotFoundError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:  # no event is so long
            self._rest = b""
        return lines
