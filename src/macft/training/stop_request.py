"""A wish to stop the run: Ctrl-C, SIGTERM, SIGHUP (a closed terminal), a launcher that ends, or another node's wish."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ANSWER_SECONDS = 0.5
"""How long the main thread may take to end until the user gets a line."""
_QUIT_SECONDS = 3.0
"""How long it may take at all once this process is to quit; a kernel of MLX can't be interrupted."""
_WATCH_SECONDS = 0.5
_INTERRUPTED = 130
NODES_STOP = "stopping: the nodes save what there is to save; Ctrl-C again quits now"
"""A launcher's answer to the first wish."""
_SHOW_CURSOR = "\x1b[?25h"


class Stopped(Exception):
    """All ranks have agreed to stop here. Every rank raises it at the same point."""


class StopRequest:
    """The first wish is answered at once and met at the next point where all ranks can agree on it; the second quits.

    Until :meth:`defer` there is nothing to save, so the first one quits, by KeyboardInterrupt in the main thread; so
    does another node's. Signals are read in a thread of their own, for the main one may be in a long call of MLX.

    Args:
        announce: Shows a line to the user. None: this process has no terminal, and the launcher answers.
        farewell: The line for a user who quits while the main thread does not answer.

    Attributes:
        plan: What happens after the first wish, in words, or what returns them at that moment.
        last_words: Called, in another thread, before this process ends although its main thread does not answer.
    """

    def __init__(
        self,
        announce: Callable[[str], None] | None = None,
        farewell: Callable[[], str] = lambda: "interrupted",
    ) -> None:
        self.plan: str | Callable[[], str] = ""
        self.last_words: Callable[[], None] = lambda: None
        self._announce, self._farewell = announce, farewell
        self._requested = threading.Event()
        self._elsewhere: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._is_deferred = self._must_quit = self._has_quit = False
        self._reason: BaseException = KeyboardInterrupt()
        self._has_left = threading.Event()
        self._has_left.set()

    @property
    def requested(self) -> bool:
        """Whether a stop was requested, here or on another node."""
        return self._requested.is_set() or self._elsewhere()

    @property
    def requested_here(self) -> bool:
        """Whether a stop was requested on this node."""
        return self._requested.is_set()

    def request(self, *, may_quit: bool = True) -> None:
        """A wish to stop, from any thread. ``may_quit``: if it is not the first one, this process quits."""
        with self._lock:
            if self._must_quit:
                return
            is_first = not self._requested.is_set()
            self._requested.set()
            quits = self._must_quit = (is_first and not self._is_deferred) or (may_quit and not is_first)
        if quits:
            self._quit(is_first=is_first)
        elif is_first and self._announce is not None:
            plan = self.plan if isinstance(self.plan, str) else self.plan()
            self._announce(f"stopping: {plan}; Ctrl-C again quits now")

    def give_up(self, reason: Exception) -> None:
        """The main thread waits in vain: ``reason`` is raised there, unless a wish to stop has come before."""
        with self._lock:
            if self._must_quit or self._requested.is_set():
                return
            self._must_quit, self._reason = True, reason
        self._quit(is_first=False)

    def defer(self, plan: str) -> None:
        """From now on the first wish waits until all ranks can agree on it; ``plan`` says what happens then."""
        with self._lock:
            self.plan, self._is_deferred = plan, True

    def follow(self, elsewhere: Callable[[], bool]) -> None:
        """A stop is also requested when ``elsewhere()`` is true: another node wants it."""
        self._elsewhere = elsewhere
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while active. SIGHUP stays ignored where it was (``nohup``).

        In another thread than the main one, as in a program of its own, there are no signals to handle.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        thread = threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True)
        self._has_left.clear()
        previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, self._handle) for number in signals}
        thread.start()
        try:
            yield
        finally:
            self._has_left.set()
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            os.write(writing, b"\0")
            thread.join()
            os.close(reading)
            os.close(writing)

    def _read(self, descriptor: int) -> None:
        while True:
            for number in os.read(descriptor, 64):
                if number == 0:
                    return
                if number in _SIGNALS:  # a closed terminal may send SIGHUP twice, which is one wish
                    self.request(may_quit=number != signal.SIGHUP)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._must_quit and not self._has_quit:
            self._has_quit = True
            raise self._reason

    def _watch(self) -> None:
        """Until there is something to save, this process quits when another node's user wants to stop."""
        while not (self._is_deferred or self._requested.is_set()):
            if self._elsewhere():
                self.request(may_quit=False)
            time.sleep(_WATCH_SECONDS)

    def _quit(self, *, is_first: bool) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # wakes it from a call that waits
        threading.Thread(target=self._see_off, args=(is_first,), name="quitting", daemon=True).start()

    def _see_off(self, is_first: bool) -> None:
        """Ends this process if the main thread does not end it."""
        if self._has_left.wait(_ANSWER_SECONDS):
            return
        if is_first and self._announce is not None:
            self._announce("stopping: there is nothing to save yet")
        if self._has_left.wait(_QUIT_SECONDS - _ANSWER_SECONDS):
            return
        is_wish = isinstance(self._reason, KeyboardInterrupt)
        with contextlib.suppress(Exception):
            self.last_words()
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout.isatty():
                sys.stdout.write(_SHOW_CURSOR)
                sys.stdout.flush()
            print(self._farewell() if is_wish else f"error: {self._reason}", file=sys.stderr, flush=True)
        os._exit(_INTERRUPTED if is_wish else 1)


def announce(line: str) -> None:
    """Shows a line on standard error, if that is still read."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
