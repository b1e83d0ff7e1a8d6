"""Products with tiled factors: two batched matmuls, one fused kernel, or one for few rows."""

import functools
import typing

import jax

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.support import DTYPES, on_hopper, vary
from sparsax.pallas.tsvd import fused, products, split

Schedule = typing.Literal["fused", "products", "split"]
FASTER_FROM = 4096  # rows; with 512 it depends on the compression which way is faster
FEW, FEW_TILES = 16, 64  # rows at most, tiles at least, of what was timed with few rows
ALIGNMENT = 64, 16  # what divides tiles and ranks: a chunk's columns, a matrix instruction's depth


def tsvd_refusal(x, u, v, activation: str | None) -> str | None:
    """Why the kernels cannot take these arrays, forward or backward; None if they can."""
    (_, size, _, rank), columns = u.shape, v.shape[3]
    if str(x.dtype) not in DTYPES:
        return f"takes x and factors in one of {DTYPES}; got {x.dtype}"
    if activation not in (None, *ACTIVATIONS):
        return f"takes activation None or one of {tuple(ACTIVATIONS)}; got {activation!r}"
    if size % ALIGNMENT[0] or columns % ALIGNMENT[0]:
        return f"takes tiles in multiples of {ALIGNMENT[0]}; got {size} x {columns}"
    if rank % ALIGNMENT[1]:
        return f"takes ranks in multiples of 16; got {rank}, see TiledFactors.pad_rank(16)"
    if not on_hopper():
        return f"needs an NVIDIA Hopper GPU; the default device is {jax.devices()[0].device_kind}"
    return None


def tsvd_is_faster(x, u, v, activation: str | None) -> bool:
    """Whether the kernels can run, and were measured to be faster than XLA (forward alone)."""
    rows = x.size // x.shape[-1]
    if not isinstance(rows, int):  # a dimension is symbolic
        return False
    faster = rows >= FASTER_FROM or few_are_faster(rows, u, v)
    return faster and tsvd_refusal(x, u, v, activation) is None


def few_are_faster(rows: int, u, v) -> bool:
    """Whether "split" was measured to be the fastest way with such factors.

    With 1 and 16 rows and tiles of 256 it took less time than XLA and than the other schedules at
    every rank (16, 32, 64). With tiles of 512 XLA was ahead in 3 of 8 cases.
    """
    num_in, size, num_out, rank = u.shape
    timed = size == v.shape[3] == 256 and rank <= 64 and num_in * num_out >= FEW_TILES
    return timed and 1 <= rows <= FEW


def best_schedule(rows: int, u, v) -> Schedule:
    """Which way to compute `x w` for so many rows; few of them as `few_are_faster` says.

    The fused kernel is chosen where all of these hold:
    - It has a tiling, see `fused.Tiling.of`.
    - R >= 256 / c, c the thread blocks of a cluster that share copies of x: they divide J, so an
      odd number of outputs shares none. In numbers read from the L2 cache for each row, the fused
      kernel then needs D J / c of x, no more than the D J R / 256 that the products read of it. The
      2 I J R that they write and read of `x u`, many times as large as x and y, come on top.
    - Its tiles, J for every 128 rows, fill the GPU: 256 or more.
    """
    if few_are_faster(rows, u, v):
        return "split"
    tiling = fused.Tiling.of(u, v)
    if tiling is None:
        return "products"
    tiles = -(-rows // fused.ROWS) * u.shape[2]
    return "fused" if u.shape[3] >= 256 // tiling.cluster and tiles >= 256 else "products"


def tsvd_forward(
    x, u, v, bias, *, activation: str | None, schedule: Schedule | None = None, interpret=None
):  # fmt: skip
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles."""
    schedule = schedule or best_schedule(len(x), u, v)
    return _forward(x, u, v, bias, activation, schedule, interpret)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _forward(x, u, v, bias, activation: str | None, schedule: Schedule, interpret):
    run = {"fused": fused, "products": products, "split": split}[schedule].forward
    y = run(x, u, v, bias, activation=activation, interpret=interpret)
    return vary(y, (x, u, v, bias))


@functools.partial(jax.jit, static_argnames="interpret")
def tsvd_backward(x, u, v, dy, *, interpret=None):
    """`(dx, du, dv)`; the product `x u` is computed again."""
    return vary(products.backward(x, u, v, dy, interpret=interpret), (x, u, v, dy))
