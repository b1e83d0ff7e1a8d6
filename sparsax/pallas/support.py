"""Where the kernels run and what they cannot do."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.config import TABLE
from sparsax.pallas.block_sparse.tiles import ROWS

BLOCKS = (32, 64, ROWS)
DTYPES = ("bfloat16", "float16")

# What stands in for a Hopper GPU: parameters of interpret mode, or "lowering" for none at all.
_stand_in: contextvars.ContextVar[Any] = contextvars.ContextVar("stand_in", default=None)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Kernels traced in this context run on the CPU, warpgroup by warpgroup: slow, for tests.

    jit keeps what it traced, so call a freshly jitted function. The simulated warpgroups wait for
    each other in threads of the CPU client: give it as many devices (`jax_num_cpu_devices`). Of its
    pool each that waits holds a thread, and the caller another: on a machine of few cores they can
    wait for ever unless the environment has `NPROC=8`, or more, before JAX starts.

    Args:
        detect_races: also record races between warpgroups.
    """
    with _standing_in(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Kernels may be traced and lowered for CUDA in this context on a machine without a GPU.

    For `jax.jit(f).trace(...).lower(lowering_platforms=("cuda",))` and `jax.export`.
    """
    with _standing_in("lowering"):
        yield


@contextlib.contextmanager
def _standing_in(value):
    token = _stand_in.set(value)
    try:
        yield
    finally:
        _stand_in.reset(token)


def interpret() -> Any:
    """What `plgpu.kernel(interpret=)` takes here: None outside of `interpreted`."""
    value = _stand_in.get()
    return None if value == "lowering" else value


def on_hopper() -> bool:
    """Whether kernels can run here: the default device is a Hopper GPU, or one is stood in for."""
    if _stand_in.get() is not None:
        return True
    device = jax.devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"


def refusal(q, block_q: int, block_kv: int) -> str | None:
    """Why the kernels cannot take these queries and pattern blocks; None if they can."""
    if str(q.dtype) not in DTYPES:
        return f"takes q, k, v in one of {DTYPES}; got {q.dtype}"
    if q.shape[-1] not in TABLE:
        return f"takes head features H in {tuple(TABLE)}; got H={q.shape[-1]}"
    if block_q not in BLOCKS or block_kv not in BLOCKS:
        return f"takes pattern blocks of {BLOCKS}; got {block_q} x {block_kv}"
    if not on_hopper():
        return f"needs an NVIDIA Hopper GPU; the default device is {jax.devices()[0].device_kind}"
    return None


def vary(outputs, inputs):
    """Outputs of a kernel, said to vary over the mesh axes that its inputs vary over.

    Inside `jax.shard_map` a kernel's outputs come without that type, which gradients must have.
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(inputs)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes), to="varying"), outputs)
