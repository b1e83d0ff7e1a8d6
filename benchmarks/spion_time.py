"""Where the time of a SPION script goes: one line a phase, and an end that is kept."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

BEGIN = time.monotonic()  # of the script, what it imports aside
EVERY = 10.0  # seconds between two lines about the same training


def say(text: str) -> None:
    """Prints a line with the seconds since the script began, above the progress bars."""
    tqdm.write(f"{time.monotonic() - BEGIN:6.1f} s | {text}")
    sys.stdout.flush()


class Deadline:
    """The end of `--minutes`, counted from the begin of the script."""

    def __init__(self, minutes: float):
        self.end = BEGIN + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def over(self) -> bool:
        """Whether there are none left."""
        return self.left() < 0


class Watch:
    """The `stop` of a run: says now and then how fast it is, and ends it when time is up.

    Args:
        name: of the run.
        count: steps between two questions.
        stop: whether time is up.
    """

    def __init__(self, name: str, count: int, stop: Callable[[], bool]):
        self.name, self.count, self.stop = name, count, stop
        self.steps, self.begin, self.told = 0, 0.0, 0.0

    def __call__(self) -> bool:
        """Whether to end the run."""
        now = time.monotonic()
        if self.steps == 0:
            self.begin = self.told = now  # the first call might have compiled
        self.steps += self.count
        if now - self.told > EVERY:
            rate = (self.steps - self.count) / (now - self.begin)
            say(f"{self.name}: {self.steps} steps, {rate:.0f} a second")
            self.told = now
        return self.stop()
