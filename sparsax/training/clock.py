"""How long a training step takes, with everything else left out."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Clock:
    """Times steps between rows of a log; other work pauses it, compilation restarts it.

    Steps run ahead of Python, so the clock waits for their results wherever it is read.
    """

    def __init__(self):
        self.restart()

    def restart(self, results: Any = None) -> None:
        """Forgets what was counted, e.g. the first step of a phase, which compiles."""
        jax.block_until_ready(results)
        self.steps, self.seconds, self.begin = 0, 0.0, time.perf_counter()

    def count(self, steps: int) -> None:
        """Counts steps."""
        self.steps += steps

    @contextlib.contextmanager
    def paused(self, results: Any) -> Iterator[None]:
        """Stands still inside the `with`: a probe, an evaluation, a checkpoint."""
        jax.block_until_ready(results)
        self.seconds += time.perf_counter() - self.begin
        yield
        self.begin = time.perf_counter()

    def lap(self, results: Any) -> float | None:
        """Mean seconds of a step since the lap before; None when no step was counted."""
        with self.paused(results):
            mean = self.seconds / self.steps if self.steps else None
            self.steps, self.seconds = 0, 0.0
        return mean


def step_seconds(rows: list[dict]) -> dict[str, float]:
    """The median time of a step in each phase, from the rows of a log."""
    laps: dict[str, list[float]] = {}
    for row in rows:
        if row.get("seconds") is not None:
            laps.setdefault(row["phase"], []).append(row["seconds"])
    return {phase: float(np.median(seconds)) for phase, seconds in laps.items()}
