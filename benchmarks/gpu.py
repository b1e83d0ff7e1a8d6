"""What the benchmarks of attention on a GPU share: patterns, timing, kernel times."""

import collections
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

BLOCK = 128


def spion_like(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    """A band of three and as many full columns of blocks as the density allows, per head."""
    rng = np.random.default_rng(seed)
    i = np.arange(blocks)
    mask = np.repeat((abs(i - i[:, None]) <= 1)[None], heads, 0)
    wanted = int(density * blocks**2)
    for head in mask:
        for column in rng.permutation(blocks):
            if head.sum() + blocks > wanted:
                break
            head[:, column] = True
    return mask


def window(heads: int, blocks: int, density: float) -> np.ndarray:
    """A band of blocks as wide as the density allows."""
    i = np.arange(blocks)
    return np.repeat((abs(i - i[:, None]) <= density * blocks / 2)[None], heads, 0)


def randomly(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    """Blocks drawn one by one, and the diagonal."""
    drawn = np.random.default_rng(seed).random((heads, blocks, blocks)) < density
    return drawn | np.eye(blocks, dtype=bool)


PATTERNS = {"spion": spion_like, "window": window, "random": randomly}


def milliseconds(function, *args, calls: int = 10, repeats: int = 5) -> float:
    """Median over repeats of the mean time of queued calls, after one call that warms up."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - begin) / calls)
    return 1e3 * float(np.median(found))


def kernels(function, *args, calls: int = 5) -> dict[str, float]:
    """Milliseconds of each GPU kernel of a call, by the profiler."""
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
    return dict(sorted(total.items(), key=lambda item: -item[1])[:8])
