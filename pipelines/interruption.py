"""Ctrl-C, and the SIGTERM of a scheduler that wants its machine back, that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be; inside a callback or a destructor of a library it is printed and
forgotten, and the run goes on. Ray Train puts a handler of its own in place, which ends the process with status 0, or does nothing at all where its
run has just ended. So every signal is also written down by Python's wakeup descriptor, whoever handles it, and the work asks at every step that it
reports; what nobody could catch is not printed either.
"""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from workers.execution import Progress

__all__ = ["InterruptibleProgress", "Interruption", "Terminated", "catching_interruptions"]


class Terminated(KeyboardInterrupt):
    """The run was asked to end by SIGTERM: by a preempted machine, a container that is stopped, or `kill`. It ends as by Ctrl-C."""


class Interruption:
    """Whether Ctrl-C was pressed, or SIGTERM received.

    Args:
        signals: gets one byte per signal that the process receives, its number; not blocking. None hears of no signal.
    """

    def __init__(self, signals: socket.socket | None = None) -> None:
        self._signals = signals
        self._received: set[int] = set()

    @property
    def asked(self) -> bool:
        """Whether one of them came by now."""
        with contextlib.suppress(BlockingIOError):
            while self._signals is not None and (numbers := self._signals.recv(4096)):
                self._received |= {signal.SIGINT, signal.SIGTERM}.intersection(numbers)
        return bool(self._received)

    def error(self) -> KeyboardInterrupt:
        """What to raise for what came."""
        return Terminated() if self.asked and signal.SIGINT not in self._received else KeyboardInterrupt()

    def check(self) -> None:
        """Raise if one came and was forgotten. Other threads than the main one cannot stop the run, and are left alone.

        Raises:
            KeyboardInterrupt: one did; Terminated where it was SIGTERM.
        """
        if self.asked and threading.current_thread() is threading.main_thread():
            raise self.error()


class InterruptibleProgress:
    """Progress whose every step asks whether to go on."""

    def __init__(self, inner: Progress, interruption: Interruption) -> None:
        self._inner = inner
        self._interruption = interruption

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Pass on."""
        self._interruption.check()
        self._inner.start(what, total, done)

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Pass on."""
        self._inner.advance(count, **facts)
        self._interruption.check()

    def finish(self) -> None:
        """Pass on."""
        self._inner.finish()


@contextlib.contextmanager
def catching_interruptions() -> Iterator[Interruption]:
    """Catch Ctrl-C and SIGTERM for a while, whatever the libraries do to signals meanwhile.

    Yields:
        What tells whether one came.

    Raises:
        KeyboardInterrupt: one did; also for a SystemExit of a library's own handler, and for errors of what was interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    unraisable_before = sys.unraisablehook

    def tell_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):  # else it is asked for below, so it is not lost
            unraisable_before(unraisable)

    sys.unraisablehook = tell_unraisable
    signals, written = socket.socketpair()
    with signals, written:
        signals.setblocking(False)
        written.setblocking(False)
        told_before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        interruption = Interruption(signals)
        try:
            yield interruption
        except (SystemExit, KeyboardInterrupt) as error:
            asked = interruption.error()  # Ray's native code answers SIGTERM, like any signal, with a KeyboardInterrupt of its own
            if isinstance(error, type(asked)):
                raise
            raise asked from error
        except Exception as error:
            if interruption.asked:  # what was under way failed because it was interrupted; it is not to be tried again
                raise interruption.error() from error
            raise
        finally:
            sys.unraisablehook = unraisable_before
            signal.set_wakeup_fd(told_before)
            for number, handler in before.items():
                signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise where the main thread is now; the handler from before may be one that ignores."""
    del frame
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
