"""Programs that are compiled in the background, in the order in which they will be needed."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from spion_time import say


class Ahead:
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

    def ready(self, kind: str) -> bool:
        """Whether all of a kind is there."""
        jobs = self.jobs[kind]
        if not all(job.done() for job in jobs):
            return False
        compiled = [job.result() for job in jobs if not job.cancelled() and not job.exception()]
        return all(x is None or x.done() for x in compiled)

    def wait(self, kind: str) -> None:
        """Until all of a kind is there; raises what went wrong with it."""
        begin = time.monotonic()
        for job in self.jobs[kind]:
            compiled = job.result()
            if compiled is not None:
                compiled.result()
        if (waited := time.monotonic() - begin) > 0.1:
            say(f"waited {waited:.1f} s for {kind}")

    def close(self) -> None:
        """Waits for what is under way, which the next start will find; begins nothing more."""
        if not all(map(self.ready, self.jobs)):
            say("waiting for what is being compiled, half a minute at most: it is kept")
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
