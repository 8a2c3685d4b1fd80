"""Ctrl-C is not lost, even when a library swallows it or ends the process instead."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import pytest

from pipelines.interruption import InterruptibleProgress, Interruption, Terminated, catching_interruptions
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


def test_what_a_library_s_own_handler_ignores_comes_back_at_the_next_step() -> None:
    with catching_interruptions() as interruption:
        interruption.check()
        signal.signal(signal.SIGINT, lambda number, frame: None)
        press_ctrl_c()
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_one_that_nobody_can_catch_is_not_printed_and_comes_back_at_the_next_step(capfd: pytest.CaptureFixture[str]) -> None:
    class Fragile:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error("in a destructor")

    said: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: said.append(str(unraisable.exc_value))  # pytest has one of its own in its place
    try:
        with catching_interruptions() as interruption:
            signal.signal(signal.SIGINT, lambda number, frame: None)
            press_ctrl_c()
            Fragile(KeyboardInterrupt)
            assert said == []
            Fragile(ValueError)
            assert said == ["in a destructor"]
            with pytest.raises(KeyboardInterrupt):
                interruption.check()
        Fragile(KeyboardInterrupt)
        assert len(said) == 2  # what was there before is back
    finally:
        sys.unraisablehook = before
    assert capfd.readouterr().err == ""


def test_other_signals_do_not_count() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with catching_interruptions() as interruption:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            interruption.check()
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_fails_because_of_it_is_no_error_to_try_again() -> None:
    def work() -> None:
        signal.signal(signal.SIGINT, lambda number, frame: None)
        press_ctrl_c()
        raise ConnectionError("the cluster went away")

    with pytest.raises(KeyboardInterrupt), catching_interruptions():
        work()


def test_what_was_there_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with catching_interruptions():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a library might
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_library_that_exits_instead_counts_as_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), catching_interruptions():
        sys.exit(0)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), catching_interruptions():
        raise ZeroDivisionError


def test_other_threads_are_left_alone() -> None:
    signals, written = socket.socketpair()
    signals.setblocking(False)
    written.send(bytes([signal.SIGINT]))
    interruption = Interruption(signals)
    assert interruption.asked
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
    signals.close()
    written.close()


def test_a_scheduler_that_wants_its_machine_back_is_told_from_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        with catching_interruptions():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    def terminate_quietly() -> None:
        with catching_interruptions() as interruption:
            signal.signal(signal.SIGTERM, lambda number, frame: None)  # as a library might
            os.kill(os.getpid(), signal.SIGTERM)
            interruption.check()

    def terminate_natively() -> None:
        with catching_interruptions():
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt  # as Ray does for any signal that comes while it waits

    for way in (terminate, terminate_quietly, terminate_natively):
        with pytest.raises(Terminated):
            way()
    assert signal.getsignal(signal.SIGTERM) is before
