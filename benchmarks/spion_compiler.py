"""Programs that are lowered one after the other and compiled several at a time, before all runs.

Before, not beside: cuDNN's attention captures a CUDA graph when a program with it runs for the
first time, and that fails now and then when another thread uses the GPU meanwhile.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from spion_time import say


class Compiler:
    """Lowers one program after the other, and compiles several at a time.

    Tracing and lowering are Python, so that two at a time would both be late; XLA's compilation
    runs beside it. What compiles here is found compiled by whoever calls it afterwards.

    Args:
        stop: whether to begin nothing more.
    """

    def __init__(self, stop: Callable[[], bool]):
        self.stop = stop
        self.lowering = ThreadPoolExecutor(1)
        self.compiling = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self.jobs: dict[str, list[Future]] = {}

    def program(self, kind: str, name: str, lower: Callable[[], Any]) -> None:
        """A program of a kind; `lower` gives what `compile` can be asked of."""

        def work() -> Future | None:
            if self.stop():
                return None
            begin = time.monotonic()
            lowered = lower()
            return self.compiling.submit(_compile, f"{kind}, {name}", lowered, begin)

        self.jobs.setdefault(kind, []).append(self.lowering.submit(work))

    def call(self, kind: str, function: Callable[[], Any]) -> None:
        """A function whose first call compiles, to be called once for that, in its turn."""

        def work() -> Future | None:
            return None if self.stop() else self.compiling.submit(_call, kind, function)

        self.jobs.setdefault(kind, []).append(self.lowering.submit(work))

    def check(self, kind: str) -> None:
        """Raises what went wrong with a kind."""
        for job in self.jobs[kind]:
            if (compiled := job.result()) is not None:
                compiled.result()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        """Waits until nothing is compiled any more; after an error, begins nothing more either."""
        begin = time.monotonic()
        if error is None:
            for job in [job for jobs in self.jobs.values() for job in jobs]:
                if job.exception() is None and (compiled := job.result()) is not None:
                    compiled.exception()
            took = time.monotonic() - begin
            say(f"{len(self.jobs)} kinds of programs are there after {took:.1f} s")
        self.lowering.shutdown(cancel_futures=True)
        self.compiling.shutdown(cancel_futures=True)


def _compile(name: str, lowered: Any, begin: float) -> None:
    lower, middle = time.monotonic() - begin, time.monotonic()
    lowered.compile()
    took = time.monotonic() - middle
    say(f"compiled {name}: lowered in {lower:.1f} s, compiled in {took:.1f} s")


def _call(name: str, function: Callable[[], Any]) -> None:
    begin = time.monotonic()
    function()
    say(f"compiled {name}: {time.monotonic() - begin:.1f} s")
