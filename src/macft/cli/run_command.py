"""Runs a command's ``main`` and turns its end into an exit status."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from macft.errors import MacftError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it: 128 + SIGINT."""
_STDOUT = 1
_STATUS = {"finished": 0, "early_stopped": 0, "interrupted": INTERRUPTED}


def run_command(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Calls ``main(argv)`` and returns the exit status; None from ``main`` means 0.

    A :class:`MacftError` is printed on standard error, each line after ``error:``, and gives its own exit status.
    After Ctrl-C the line ``interrupted`` is printed. A closed pipe, as in ``macft cluster list | head -1``, ends the
    command without a message, with status 1.

    Args:
        argv: The arguments, without the program's name; by default those of the process.
    """
    # Without this, the tokenizers library prints a warning when a process that has used it forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return status
    except MacftError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        return 1


def exit_status(reason: str) -> int:
    """The exit status of a run that ended for ``reason``, a value of ``RunEnded.reason``."""
    return _STATUS[reason]


def _is_stdout_closed() -> bool:
    """Whether the reader of standard output is gone; if so, what is still buffered for it is discarded."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # errors and hang-ups are always reported
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # the interpreter flushes as it exits
    return True
