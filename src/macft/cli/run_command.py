"""Runs a command's ``main`` and turns its end into an exit status."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from macft.errors import ConfigError, MacftError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it: 128 + SIGINT."""
_STDOUT = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)
"""What is wrong with a path that the user has named, not with the program."""
_LONGEST_PATH = 200
_STATUS = {"finished": 0, "early_stopped": 0, "interrupted": INTERRUPTED}


def run_command(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: Callable[[], str] = lambda: "interrupted",
) -> int:
    """Calls ``main(argv)`` and returns the exit status; None from ``main`` means 0.

    A :class:`MacftError` is printed on standard error, each line after ``error:``, and gives its own exit status.
    A disk that is full or can't be written is one line too, and so is a path that may not be read or is none.
    After Ctrl-C, SIGTERM or SIGHUP the line that ``interrupted`` returns is printed. A closed pipe, as in
    ``macft cluster list | head -1``, ends the command without a message, with status 1.

    Args:
        argv: The arguments, without the program's name; by default those of the process.
    """
    # Without this, the tokenizers library prints a warning when a process that has used it forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_what_is_closed()
    _show_any_text()
    _end_in_order()
    try:
        _check_folder()
        status = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return status
    except MacftError as error:
        for line in str(error).splitlines():
            _complain(f"error: {line}")
        return error.exit_code
    except KeyboardInterrupt:
        _complain(interrupted())
        return INTERRUPTED
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        return 1
    except OSError as error:
        if error.errno in _PATH_ERRORS and error.filename is not None:
            _complain(f"error: {_shown(error.filename)} can't be used: {error.strerror}{_access(error)}")
            return 1
        if error.errno not in _DISK_ERRORS:
            raise
        _complain(f"error: {error.filename or 'a file'} can't be written: {error.strerror}")
        return 1


def _shown(path: str | bytes | int) -> str:
    text = str(path)
    return text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}..."


def _access(error: OSError) -> str:
    """How to get access, where it is a matter of that."""
    if not isinstance(error, PermissionError):
        return ""
    if sys.platform == "darwin":
        return "; change its permissions, or allow the terminal in System Settings > Privacy & Security"
    return "; change its permissions, or give another path"


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        print(line, file=sys.stderr)


def exit_status(reason: str) -> int:
    """The exit status of a run that ended for ``reason``, a value of ``RunEnded.reason``."""
    return _STATUS[reason]


def how_it_ended(code: int) -> str:
    """How a process ended whose return code, as ``subprocess`` gives it, is ``code``."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"


def _end_in_order() -> None:
    """Lets SIGTERM and SIGHUP end the command as Ctrl-C does: what it has begun to write is removed or finished.

    What was set otherwise stays, as under ``nohup``. When the command is done, and Python closes down, no signal
    changes its status any more.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    atexit.unregister(_ignore_signals)
    atexit.register(_ignore_signals)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _open_what_is_closed() -> None:
    """Opens the null device for standard streams that were closed, as in ``macft data ROWS >&-``.

    The next file would get the descriptor otherwise, and what is printed would be written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (_STDOUT, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _check_folder() -> None:
    """Raises ConfigError if the current folder has been removed, for paths have no beginning then."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder no longer exists; go to another one with cd") from error


def _show_any_text() -> None:
    """Lets a terminal that can't show a letter show its number instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        # With LC_ALL=C Python lets only undecodable bytes through, and not the letters that ASCII lacks.
        if stream.errors == "strict" or codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def _is_stdout_closed() -> bool:
    """Whether the reader of standard output is gone; if so, what is still buffered for it is discarded."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # errors and hang-ups are always reported
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # the interpreter flushes as it exits
    return True
