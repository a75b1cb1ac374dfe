"""Time limits of tests. A limit becomes longer while the machine is slow or has other work, so that a limit tests our
code and not the machine. Tested in tests/test_support.py."""

import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

CORES = len(os.sched_getaffinity(0))
WORK = b"".join(b"%d," % (number * number) for number in range(60_000))  # about 0.6 MB
MEASURED_EVERY_S = 5.0  # a Deadline measures the speed of the machine at least this often
WORK_S = 0.045  # seconds that one core needs to compress WORK; the limits were chosen for a core of this speed


def slowness() -> float:
    """Measures how many times slower this machine is at the moment than the machine for which the limits were chosen.

    Every core compresses the same text. The result is the time until the last core is done, divided by WORK_S. If this
    number is less than 1, the result is 1.
    """
    start = time.monotonic()
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(zlib.compress, [WORK] * CORES))
    return max(1.0, (time.monotonic() - start) / WORK_S)


class Deadline:
    """A time limit whose clock runs more slowly while the machine is slow.

    Args:
        seconds: the limit on a machine that has no other work.
    """

    def __init__(self, seconds: float) -> None:
        self._left, self._last = seconds, time.monotonic()

    def passed(self) -> bool:
        """Returns True if the time is over. This method must be called often. It measures how slow the machine is
        now, and assumes that the machine was equally slow during the whole time since the last measurement."""
        now = time.monotonic()
        if now - self._last > self._left or now - self._last > MEASURED_EVERY_S:
            self._left -= (now - self._last) / slowness()
            self._last = time.monotonic()
        return self._left < 0


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A `with` block that fails if it takes longer than `seconds`. The limit becomes longer if the machine is slow."""
    before, start = slowness(), time.monotonic()
    yield
    took = time.monotonic() - start
    if took >= seconds:
        slow = max(before, slowness())
        assert took < seconds * slow, f"took {took:.2f} s; the limit is {seconds} s x {slow:.2f} (slowness)"
