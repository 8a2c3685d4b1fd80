"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be; inside a callback or a destructor of a library it is printed and
forgotten, and the run goes on. Ray Train replaces the handler and ends the process with status 0. So the handler here also remembers, and the
work asks at every step that it reports.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from workers.execution import Progress

__all__ = ["InterruptibleProgress", "Interruption", "catching_interruptions"]


class Interruption:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember, and raise where the main thread is now.

        Args:
            number: of the signal.
            frame: where the main thread is.

        Raises:
            KeyboardInterrupt: always.
        """
        del number, frame
        self.asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise if it was pressed and forgotten. Other threads than the main one cannot stop the run, and are left alone.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.asked and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt


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
    """Catch Ctrl-C for a while, whatever the libraries do to signals meanwhile.

    Yields:
        What tells whether it was pressed.

    Raises:
        KeyboardInterrupt: for a SystemExit of a library's own handler as well.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = signal.signal(signal.SIGINT, interruption.handle)
    try:
        yield interruption
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)
