"""Ctrl-C and SIGTERM: what is running ends after its current batch, finished shards stay."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to stop: exit code 75, and the same command goes on."""


class StopSwitch:
    """Whether a signal asked the run to stop."""

    def __init__(self) -> None:
        self._is_set = False

    def check(self) -> None:
        """Raise `Stopped` where a signal came; called between batches."""
        if self._is_set:
            raise Stopped

    def press(self) -> None:
        """Ask for a stop."""
        self._is_set = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal waits for the batch, a second one does not."""
        self.check()
        self.press()
        os.write(2, b"stopping after the current batch\n")  # past Python's buffers: a handler may interrupt their use


@contextmanager
def stop_switch(signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[StopSwitch]:
    """A switch that signals press while the block runs; outside the main thread nothing presses it."""
    switch = StopSwitch()
    if threading.current_thread() is not threading.main_thread():
        yield switch
        return
    before = {number: signal.signal(number, switch.on_signal) for number in signals}
    try:
        yield switch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Processes that are started in the block leave Ctrl-C, which reaches all of a terminal's, to this one."""
    resource_tracker.ensure_running()  # else it is started with the first of them, and unblocks the signal
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
