"""Products with tiled factors as two batched matmuls, `x u` in between in global memory.

All six products of forward and backward pass are one kernel, that of `grouped_matmul`: its thread
blocks walk over tiles of all matrices of a batch. What the first writes lies as the second reads
it, so nothing is transposed on the way.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul.product import (
    CHUNK,
    Plan,
    Shape,
    beside,
    each_chunk,
    product,
    raster,
    together,
)
from sparsax.pallas.grouped_matmul.tables import DEPTH
from sparsax.pallas.hopper import (
    COL,
    COMPUTE,
    ROWS,
    WG_ROWS,
    multiprocessors,
    padded_rows,
    per_col,
)

# The widest tile that leaves beside the products of the next one: wider ones would need more
# registers than there are, and the assembler would put their products one after the other.
BESIDE = 128
LINE = CHUNK  # columns of an array must be whole lines of tile copies
STAGES = {256: 4, 128: 6, 64: 8}  # by columns of a tile: 192 KiB, as few tiles must be in flight


class Stack(NamedTuple):
    """A batch of matrices `[batch, rows, columns]`, or `[rows, batch, columns]` (`middle`).

    `turned`: their transposes are meant, read as they are stored.
    """

    array: Any
    middle: bool = False
    turned: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Matrices, and rows and columns of the matrices that are meant."""
        batch, first, second = self.array.shape
        if self.middle:
            batch, first = first, batch
        return (batch, second, first) if self.turned else (batch, first, second)

    def part(self, ref, batch, rows, columns):
        """A tile in global memory, in the order in which it is stored."""
        first, second = (columns, rows) if self.turned else (rows, columns)
        return ref.at[first, batch, second] if self.middle else ref.at[batch, first, second]


def forward(x, u, v, bias, *, activation: str | None, interpret=None):
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles."""
    rows, views = x.shape[0], _views(u, v)
    p = _hidden(padded_rows(x), u, views[0], interpret)
    options = {"bias": bias, "activation": activation, "interpret": interpret}
    return batched(Stack(p), views[1], "middle", "tsvd_out", **options)[:rows]


def backward(x, u, v, dy, *, interpret=None):
    """`(dx, du, dv)`; `x u` is computed again."""
    rows, (us, vs), (num_in, size, num_out, rank) = x.shape[0], _views(u, v), u.shape
    x, dy = padded_rows(x), padded_rows(dy)
    run = lambda *a, **options: batched(*a, **options, interpret=interpret)
    xs = Stack(x.reshape(-1, num_in, size), middle=True)
    dys = Stack(dy.reshape(len(dy), num_out, -1), middle=True)
    p = _hidden(x, u, us, interpret)
    slots = {"slots": _slots(num_out, rank), "columns": _slots(num_in, rank) * rank}
    dp = run(dys, vs._replace(turned=True), rank, "tsvd_dhidden", **slots)
    dx = run(Stack(dp), us._replace(turned=True), "middle", "tsvd_dx")
    du = run(xs._replace(turned=True), Stack(dp), "leading", "tsvd_du")
    dv = run(Stack(p, turned=True), dys, "leading", "tsvd_dv", rows=num_in * rank)
    return dx[:rows], du[..., : num_out * rank].reshape(u.shape), dv.reshape(v.shape)


def batched(
    a: Stack, b: Stack, to: int | Literal["leading", "middle"], name: str, *,
    rows: int | None = None, columns: int | None = None, slots: int | None = None, bias=None,
    activation: str | None = None, interpret=None,
):  # fmt: skip
    """`activation(a[s] b[s] + bias[s])` for every s, in a's dtype.

    `to` says where it goes: "leading" `[S, M, N]`; "middle" `[M, S * N]`; a number R to exchange
    the batch for the columns (t, r), N = T R, which makes `[T, M, S R]`. `rows` and `columns` are
    those of the result if not of a and b: others are cut off, and what b lacks is 0, as are batches
    up to `slots`.
    """
    batch, inner = min(a.sizes[0], b.sizes[0]), a.sizes[2]
    rows, columns, slots = rows or a.sizes[1], columns or b.sizes[2], slots or batch
    width, cluster = tiles(slots, rows, columns)
    high, wide, steps = -(-rows // (ROWS * cluster)), columns // width, -(-inner // DEPTH)
    chunk = CHUNK if isinstance(to, str) else next(c for c in (CHUNK, 32, 16) if to % c == 0)

    def make(a_ref, b_ref, *rest):
        *bias_ref, out_ref = rest

        def item(n):
            which = lax.div(n, jnp.int32(high * wide))
            row, column = raster(n - which * high * wide, high, wide)
            part = (row * cluster + beside(cluster)) * COMPUTE
            return _Item(which, jnp.minimum(which, batch - 1), part, column, jnp.int32(steps))

        def fill(here, step, a_smem, b_smem, barrier):
            summed = pl.ds(step * DEPTH, DEPTH)
            for half in range(COMPUTE):
                own = pl.ds((here.part + half) * WG_ROWS, WG_ROWS)
                part = a.part(a_ref, here.source, own, summed)
                plgpu.copy_gmem_to_smem(part, a_smem.at[half], barrier)
            part = b.part(b_ref, here.source, summed, pl.ds(here.column * width, width))
            plgpu.copy_gmem_to_smem(part, b_smem.at[0], barrier, **together(cluster))

        def finish(here, totals):
            total = _epilogue(here, totals[0], columns, bias_ref, activation)
            return total if slots == batch else total * jnp.where(here.batch < batch, 1.0, 0.0)

        def store(here, wg, tile, staging):
            part = here.part + wg

            def copy(staged, begin):
                own = pl.ds(part * WG_ROWS, WG_ROWS)
                matrix, place = _place(here, to, width // chunk, chunk, begin // chunk)
                at = (own, matrix, place) if to == "middle" else (matrix, own, place)
                pl.when(part * WG_ROWS < rows)(
                    lambda: plgpu.copy_smem_to_gmem(staged, out_ref.at[at])
                )

            each_chunk(tile, staging, a.array.dtype, copy)

        return Plan(jnp.int32(slots * high * wide), item, fill, finish, store)

    out = {"leading": (batch, rows, columns), "middle": (rows, batch, columns)}.get(str(to))
    if out is None:
        out = columns // int(to), rows, slots * int(to)
    shape = Shape(
        width, a.array.dtype, transpose_a=a.turned, transpose_b=b.turned, chunk=chunk,
        cluster=cluster, stages=STAGES[width], steps=steps if width <= BESIDE else None,
    )  # fmt: skip
    types = (jax.ShapeDtypeStruct(out, a.array.dtype),)
    run = product(make, shape, name, slots * high * wide, types, interpret)
    operands = [] if bias is None else [bias.astype(jnp.float32)]
    (result,) = run(a.array, b.array, *operands)
    return result.reshape(rows, -1) if to == "middle" else result


class _Item(NamedTuple):
    batch: Any  # of the result
    source: Any  # of a and b
    part: Any  # of the result's rows, one for each warpgroup
    column: Any  # in tiles; sizes are multiplied at use, which proves copies to be aligned
    steps: Any


def tiles(batch: int, rows: int, columns: int) -> tuple[int, int]:
    """Columns of a tile, and how many thread blocks with rows of their own share them.

    Wide tiles and clusters read less; narrow tiles are for products too small to keep every
    multiprocessor busy.
    """
    high, widths = -(-rows // ROWS), [w for w in STAGES if columns % w == 0]
    count = lambda width: batch * high * columns // width
    width = next((w for w in widths if count(w) >= multiprocessors()), widths[-1])
    busy = count(width) >= multiprocessors()
    return width, 2 if busy and (high % 2 == 0 or high > 8) else 1


def _place(here: _Item, to, chunks: int, chunk: int, number: int):
    """Matrix and columns of the result that a chunk of a tile goes to."""
    first = here.column * chunks + number  # in chunks, as is all that follows
    if isinstance(to, str):
        return here.batch, pl.ds(first * chunk, chunk)
    rank = to // chunk
    matrix = lax.div(first, jnp.int32(rank))
    return matrix, pl.ds((here.batch * rank + first - matrix * rank) * chunk, chunk)


def _epilogue(here: _Item, total, columns: int, bias_ref, activation: str | None):
    if bias_ref:
        width = total.shape[1]
        # In units of 64 columns, which divide tiles that have a bias.
        begin = (here.batch * (columns // CHUNK) + here.column * (width // CHUNK)) * CHUNK
        part = bias_ref[0].at[pl.ds(begin, width)]
        total = total + per_col(plgpu.load(part, layout=COL, optimized=False), total.shape)
    return total if activation is None else ACTIVATIONS[activation](total)


def _hidden(x, u, us: Stack, interpret):
    """`x u` `[J, M, I*R]`, with zeros for the slots that pad I and J."""
    num_in, size, _, rank = u.shape
    xs = Stack(x.reshape(len(x), num_in, size), middle=True)
    return batched(
        xs, us, rank, "tsvd_hidden", slots=_slots(num_in, rank), interpret=interpret
    )  # fmt: skip


def _slots(count: int, rank: int) -> int:
    """So many tiles and more that their ranks fill whole lines of 64."""
    return -(-count // (few := LINE // math.gcd(rank, LINE))) * few


def _views(u, v) -> tuple[Stack, Stack]:
    """The factors as batches: `[I, A, J*R]`, padded by zeros to whole lines, and `[J, I*R, C]`."""
    (num_in, size, num_out, rank), columns = u.shape, v.shape[3]
    extra = (_slots(num_out, rank) - num_out) * rank
    us = jnp.pad(u.reshape(num_in, size, -1), ((0, 0), (0, 0), (0, extra)))
    return Stack(us), Stack(v.reshape(num_out, -1, columns))
