"""How a run's end becomes an exit status and, for an error, one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from macft.errors import MacftError

_STATUS = {"finished": 0, "early_stopped": 0, "interrupted": 130}


def exit_status(run: Callable[[], str]) -> int:
    """Calls ``run`` and returns 0 for a finished run, 130 for an interrupted one, the error's own status otherwise."""
    try:
        return _STATUS[run()]
    except MacftError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the newest checkpoint is kept", file=sys.stderr)
        return 130
