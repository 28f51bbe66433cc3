"""Signals that ask for a stop: what is running ends at its next safe point, what is finished stays."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

KEYBOARD_AND_TERM = (signal.SIGINT, signal.SIGTERM)
STOP_SIGNALS = (*KEYBOARD_AND_TERM, signal.SIGUSR1)
"""Schedulers send one of the last two ahead of the end of a job's time."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop: exit code 75, and the same command goes on."""


class StopSwitch:
    """Whether a signal asked the run to stop."""

    def __init__(self, message: str = "stopping after the current batch", insists: bool = True):
        """
        Args:
            message: said when the first signal comes; empty says nothing.
            insists: a second signal does not wait. Without it, signals are only counted.
        """
        self._message, self._insists = message, insists
        self.is_pressed = False

    def check(self) -> None:
        """Raise `Stopped` where a signal came; called between batches."""
        if self.is_pressed:
            raise Stopped

    def check_at_once(self) -> None:
        """`check`, for one who waits for something that may not come, unless signals are only counted."""
        if self._insists:
            self.check()

    def press(self) -> None:
        """Ask for a stop."""
        self.is_pressed = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal waits for the next safe point, a second one does not if it may insist."""
        if self._insists:
            self.check()
        if not self.is_pressed and self._message:
            # Past Python's buffers: a handler may interrupt their use.
            os.write(2, f"{self._message}\n".encode())
        self.press()


@contextmanager
def stop_switch(
    signals: Sequence[signal.Signals] = KEYBOARD_AND_TERM, switch: StopSwitch | None = None
) -> Iterator[StopSwitch]:
    """A switch that signals press while the block runs; outside the main thread nothing presses it."""
    switch = switch or StopSwitch()
    _switches.append(switch)
    try:
        with _handled(signals, switch.on_signal):
            yield switch
    finally:
        _switches.remove(switch)


_switches: list[StopSwitch] = []


def check_stop() -> None:
    """Raise `Stopped` where a signal asked this process to stop; for code that waits and has no switch at hand."""
    for switch in _switches:
        switch.check_at_once()


@contextmanager
def stopped_at_once(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals raise `Stopped` while the block runs: there is nothing to finish."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    with _handled(signals, stop):
        yield


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Processes that are started in the block leave Ctrl-C, which reaches all of a terminal's, to this one."""
    resource_tracker.ensure_running()  # else it is started with the first of them, and unblocks the signal
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
