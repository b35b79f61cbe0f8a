"""A timer of the kernel that an event loop waits for, for what is due to the microsecond.

An event loop's own timers count whole milliseconds; a thread that sleeps until the moment is woken
in time and then waits for the interpreter. Linux only.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # that of time.perf_counter
_TFD_TIMER_ABSTIME = 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Timer:
    """Calls `fire` at the moment that was `set` last."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Callable[[], None]) -> None:
        """Raises:
        OSError: there is no such timer here.
        """
        self._loop, self._fire = loop, fire
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _TimerSpec()
        self._spec_pointer = ctypes.byref(self._spec)
        loop.add_reader(self._handle, self._fired)

    def set(self, at: float) -> None:
        """Fire at this value of `time.perf_counter`, or at once if it has passed."""
        seconds = int(at)
        # All zeros would mean never.
        self._spec.value.seconds = seconds
        self._spec.value.nanoseconds = max(1, int((at - seconds) * 1e9))
        if self._libc.timerfd_settime(self._handle, _TFD_TIMER_ABSTIME, self._spec_pointer, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._handle)
        os.close(self._handle)

    def _fired(self) -> None:
        try:
            os.read(self._handle, 8)
        except BlockingIOError:  # set anew since
            return
        self._fire()
