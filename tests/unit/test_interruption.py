"""Ctrl-C is not lost, even when a library swallows it or ends the process instead."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest

from pipelines.interruption import InterruptibleProgress, Interruption, catching_interruptions
from workers.execution import SilentProgress


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # the handler runs at the next bytecode


def test_a_swallowed_interruption_comes_back_at_the_next_step() -> None:
    with catching_interruptions() as interruption:
        progress = InterruptibleProgress(SilentProgress(), interruption)
        progress.start("work", 2)
        progress.advance()
        with contextlib.suppress(KeyboardInterrupt):
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            progress.advance()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_the_handler_from_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with catching_interruptions():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a library might
    assert signal.getsignal(signal.SIGINT) is before


def test_a_library_that_exits_instead_counts_as_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), catching_interruptions():
        sys.exit(0)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), catching_interruptions():
        raise ZeroDivisionError


def test_other_threads_are_left_alone() -> None:
    interruption = Interruption()
    interruption.asked = True
    seen: list[BaseException] = []

    def work() -> None:
        try:
            interruption.check()
            with catching_interruptions():
                pass
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt is what must not come
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == []
