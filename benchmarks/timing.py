"""How benchmarks on a GPU time: calls in loops inside one program, runs that queue up, kernels.

The host is out of the way of what is timed, as it is in a training step.
"""

import collections
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

UNROLLED = 4  # calls in one step of a loop that is timed
HELD = 2**25  # bytes of results that wait to be read
SPAN, MOST = 0.05, 200  # seconds that are timed at once, and runs that queue up for it


def repeated(function, calls: int, unrolled: int = UNROLLED, *, results: bool = False):
    """A jitted function that calls `function` so often, one call after the other.

    As in a training step, the host is out of the way: it would take longer to dispatch a call than
    a GPU takes for a short one. A step of the loop is `unrolled` calls, for a step takes some 10 us
    whatever is in it. Barriers tie the arguments of a call to what the calls before it wrote, so
    that XLA can take none of the work out of the loop, make one of two calls, or compute less than
    all results. A kernel of some 2 us reads an element of each result of as many calls as fit in
    `HELD` bytes, or of one.

    It returns a number; with `results`, also what the last call did.
    """
    function = jax.jit(function)  # lowered once for all calls of a step

    @jax.jit
    def run(*args):
        made = jax.tree.leaves(jax.eval_shape(function, *args))
        at_once = max(1, HELD // sum(x.size * x.dtype.itemsize for x in made))

        def read(before, results):
            results = jax.lax.optimization_barrier(results)
            return before + sum(x[(0,) * x.ndim].astype(np.float32) for x in results)

        def step(before, number):
            made, last = [], None
            for i in range(number):
                of_call, before, made = jax.lax.optimization_barrier((args, before, made))
                last = function(*of_call)
                made += jax.tree.leaves(last)
                if i % at_once == at_once - 1:
                    before, made = read(before, made), []
            return read(before, made), last

        steps = (calls - 1) // unrolled
        body = lambda before, _: (step(before, unrolled)[0], None)
        before, _ = jax.lax.scan(body, jnp.float32(0), length=steps)
        read_last = step(before, calls - steps * unrolled)
        return read_last if results else read_last[0]

    return run


def milliseconds(run, *args, calls: int, repeats: int = 5) -> float:
    """Median over repeats of the time of a call of a `repeated` function."""
    return milliseconds_in_turns({"": Queue.of(run, *args, calls=calls)}, repeats=repeats)[""]


def queued_milliseconds(run, wait, *, calls: int = 1, repeats: int = 5) -> float:
    """Median over repeats of the time of a call; `run()` queues `calls` of them on the device."""
    return milliseconds_in_turns({"": Queue(run, wait, calls)}, repeats=repeats)[""]


class Queue(NamedTuple):
    """Work that queues up on the device."""

    run: Callable[[], None]  # queues `calls` calls
    wait: Callable[[], None]  # until all is done that was queued
    calls: int = 1

    @classmethod
    def of(cls, run, *args, calls: int) -> "Queue":
        """Runs of a `repeated` function."""
        last = None

        def once():
            nonlocal last
            last = run(*args)

        return cls(once, lambda: jax.block_until_ready(last), calls)

    def seconds(self, runs: int) -> float:
        """That so many runs take, one after the other."""
        begin = time.perf_counter()
        for _ in range(runs):
            self.run()
        self.wait()
        return time.perf_counter() - begin


def milliseconds_in_turns(queues: dict[str, Queue], *, repeats: int = 5) -> dict[str, float]:
    """Median over repeats of the time of a call of each; they take turns.

    So many runs queue up at a time as take up to `SPAN` seconds together: to start one, and to
    learn that it is done, takes the host up to half a millisecond. A GPU lowers its clocks by what
    it has drawn just before, which turns spread over all that are compared.
    """
    runs = {}
    for name, queue in queues.items():
        queue.seconds(1)  # warm
        runs[name] = max(1, min(MOST, int(SPAN / queue.seconds(1))))
    rounds = [{name: queue.seconds(runs[name]) for name, queue in queues.items()}
              for _ in range(repeats)]  # fmt: skip
    return {
        name: 1e3 * float(np.median([each[name] for each in rounds])) / (runs[name] * queue.calls)
        for name, queue in queues.items()
    }


def replayed_milliseconds(run, *, repeats: int = 5) -> float:
    """The same for calls of PyTorch, recorded as a graph: the host is out of the way, as above.

    `run()` returns tensors that it makes, by which it is seen that the recording does the work.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled, tuned and warm before it is recorded
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # JAX, in threads of its own, may free memory meanwhile, which must not end the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(UNROLLED):
            made = run()
    for tensor in made:
        tensor.zero_()
    graph.replay()
    if not all(tensor.any() for tensor in made):
        raise RuntimeError("the recorded graph leaves results as they were")
    return queued_milliseconds(
        graph.replay, torch.cuda.synchronize, calls=UNROLLED, repeats=repeats
    )


def kernels(function, *args, calls: int = 5, most: int = 8) -> dict[str, float]:
    """Milliseconds of a call in each of the GPU kernels that take longest, by the profiler."""
    total = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = function(*args)
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "GPU" not in plane.name:
                continue
            for line in (x for x in plane.lines if x.name.startswith("Stream")):
                for event in line.events:
                    total[event.name] += event.duration_ns / 1e6 / calls
    return dict(sorted(total.items(), key=lambda item: -item[1])[:most])
