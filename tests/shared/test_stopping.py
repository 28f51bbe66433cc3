"""Signals press a switch; the block that they interrupt goes on to its next batch."""

import os
import signal
import threading

import pytest

from shared.stopping import Stopped, StopSwitch, stop_switch, stopped_at_once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_batch(number: signal.Signals):
    with stop_switch() as switch:
        switch.check()
        os.kill(os.getpid(), number)
        finished = True  # still here: nothing was interrupted
        with pytest.raises(Stopped):
            switch.check()
    assert finished


def test_a_second_signal_does_not_wait():
    with stop_switch():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_switch():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_thread_gets_a_switch_that_no_signal_presses():
    seen = []

    def body() -> None:
        with stop_switch() as switch:
            switch.check()
            switch.press()
            with pytest.raises(Stopped):
                switch.check()
            seen.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_switch_that_does_not_insist_counts_any_number_of_signals():
    with stop_switch((signal.SIGTERM, signal.SIGUSR1), StopSwitch("", insists=False)) as switch:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert switch.is_pressed


def test_where_there_is_nothing_to_finish_a_signal_ends_the_block_at_once():
    with stopped_at_once([signal.SIGUSR1]), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
