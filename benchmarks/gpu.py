"""What the benchmarks of attention on a GPU share: patterns, and loops of both passes."""

import dataclasses
import os
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from timing import UNROLLED, kernels, milliseconds, repeated

BLOCK = 128


def leave_products_to_cublas() -> None:
    """Has XLA write no kernels of its own for matrix products; before JAX first computes.

    By default it compiles and times dozens for every product: minutes for a training step, while
    nothing else may run on the GPU. For scripts that compile many programs to compare them, all
    alike; results name the flag.
    """
    flags = "--xla_gpu_enable_triton_gemm=false", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


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


def bigbird(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    """A band of three, the first row and column, and drawn blocks up to the density."""
    i = np.arange(blocks)
    fixed = (abs(i - i[:, None]) <= 1) | (i == 0) | (i == 0)[:, None]
    rest = max(0.0, (density - fixed.mean()) / (1 - fixed.mean()))
    return fixed | (np.random.default_rng(seed).random((heads, blocks, blocks)) < rest)


PATTERNS = {"spion": spion_like, "window": window, "bigbird": bigbird, "random": randomly}


def both(attend):
    """Forward and backward as one function of `(q, k, v, do, *rest)`."""

    def run(q, k, v, do, *rest):
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return o, pull(do)

    return run


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled loops of one kind of attention at one size: forward, forward and backward."""

    calls: int
    forward: Future
    both: Future

    @classmethod
    def start(
        cls, pool: ThreadPoolExecutor, attend, arrays, *rest, calls: int, unrolled: int = UNROLLED
    ) -> "Programs":
        """Traces them here and compiles them in the pool."""
        compile_ = lambda function, *args: pool.submit(
            repeated(function, calls, unrolled).lower(*args, *rest).compile
        )
        return cls(calls, compile_(attend, *arrays[:3]), compile_(both(attend), *arrays))

    def time(self, arrays, *rest) -> dict[str, float]:
        """Milliseconds of forward alone, and of forward and backward.

        And the bytes that XLA reserves for the loop of the latter beside the arguments: results of
        a call are among them.
        """
        memory = self.both.result().memory_analysis()
        return {
            "forward_ms": milliseconds(self.forward.result(), *arrays[:3], *rest, calls=self.calls),
            "both_ms": milliseconds(self.both.result(), *arrays, *rest, calls=self.calls),
            "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        }

    def kernels(self, arrays, *rest) -> dict[str, float]:
        """Milliseconds of every kernel of a forward and backward pass."""
        found = kernels(self.both.result(), *arrays, *rest, calls=1)
        return {name: time / self.calls for name, time in found.items()}
