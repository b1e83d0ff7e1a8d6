"""`y[rows of g] = activation(x[rows of g] w[g] + bias[g])`, rows of no group 0."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.grouped_matmul import tables
from sparsax.pallas.grouped_matmul.product import (
    CHUNK,
    Plan,
    Shape,
    each_chunk,
    product,
    raster,
    width_of,
)
from sparsax.pallas.grouped_matmul.tables import DEPTH, SLAB
from sparsax.pallas.hopper import COL, COMPUTE, WG_ROWS, per_col
from sparsax.pallas.tsvd_matmul import ACTIVATIONS


def gmm(x, w, group_sizes, bias=None, *, transpose_w: bool, activation=None, interpret=None):
    """`[M, F]` in x's dtype, of x `[M, D]` and w `[G, D, F]`, or `[G, F, D]` to be transposed."""
    rows = x.shape[0]
    x = jnp.pad(x, ((0, max(-rows % SLAB, WG_ROWS - rows)), (0, 0)))
    starts, ends = tables.bounds(group_sizes, rows)
    # Rows of no group are one more, of no steps and no bias.
    starts = jnp.concatenate([starts, ends[-1:]])
    ends = jnp.concatenate([ends, jnp.full_like(ends[:1], x.shape[0])])
    table = tables.row_tiles(starts, ends, x.shape[0])
    operands = [x, w, table]
    if bias is not None:
        operands.append(jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0))))
    activate = ACTIVATIONS.get(activation or "")
    run = _kernel(x, w, bias is not None, transpose_w, activate, interpret)
    y, shared = run(*operands)
    # Slabs that groups share were put aside: each group's rows of them find their place here.
    where = tables.shared_rows(starts, ends).reshape(-1)
    nowhere = x.shape[0] + jnp.arange(where.size)
    where = jnp.where(where < 0, nowhere, where)
    values = shared.reshape(-1, y.shape[1])
    return y.at[where].set(values, mode="drop", unique_indices=True)[:rows]


class _Item(NamedTuple):
    group: Any
    slab: Any  # the tile's first
    column: Any  # in tiles; sizes are multiplied at use, which proves copies to be aligned
    start: Any  # of the group
    end: Any
    steps: Any


def _kernel(x, w, has_bias: bool, transpose_w: bool, activate, interpret):
    rows, depth = x.shape
    groups, columns = w.shape[0], w.shape[1 if transpose_w else 2]
    width, most = width_of(columns), tables.most_tiles(rows, groups + 1)
    wide = columns // width

    def make(x_ref, w_ref, table, *rest):
        bias_ref = rest[0] if has_bias else None
        y_ref, shared_ref = rest[-2:]

        def item(n):
            tile, column = raster(n, table[0], wide)
            group, slab, start, end = (table[1 + i * most + tile] for i in range(4))
            steps = jnp.where(group < groups, depth // DEPTH, 0)
            return _Item(group, slab, column, start, end, steps)

        def fill(here, step, a, b, barrier):
            inner = pl.ds(step * DEPTH, DEPTH)
            for half in range(COMPUTE):
                own = pl.ds(here.slab * SLAB + half * WG_ROWS, WG_ROWS)
                plgpu.copy_gmem_to_smem(x_ref.at[own, inner], a.at[half], barrier)
            outer = pl.ds(here.column * width, width)
            part = (outer, inner) if transpose_w else (inner, outer)
            plgpu.copy_gmem_to_smem(w_ref.at[(here.group, *part)], b, barrier)

        def store(here, wg, total, staging):
            if bias_ref is not None:
                part = bias_ref.at[here.group, pl.ds(here.column * width, width)]
                bias = plgpu.load(part, layout=COL, optimized=False)
                total = total + per_col(bias, total.shape)
            total = total if activate is None else activate(total)
            row, column = here.slab * SLAB + wg * WG_ROWS, here.column * width
            copy = lambda chunk, begin: _copy_out(
                here, row, column + begin, chunk, y_ref, shared_ref
            )
            each_chunk(total, staging, x.dtype, copy)

        return Plan(table[0] * wide, item, fill, store)

    shape = Shape(width, x.dtype, transpose_b=transpose_w)
    out = (
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        jax.ShapeDtypeStruct((2 * (groups + 1), SLAB, columns), x.dtype),
    )
    return product(make, shape, "gmm", most * wide, out, interpret)


def _copy_out(here: _Item, row, column, chunk, y_ref, shared_ref) -> None:
    """Stores what a warpgroup has of the group's rows; slabs with rows of others go aside."""
    own = pl.ds(column, CHUNK)
    start, end = (jnp.clip(x - row, 0, WG_ROWS) for x in (here.start, here.end))
    first, last = (start + SLAB - 1) // SLAB, end // SLAB  # slabs of its own
    whole = (first == 0) & (last == WG_ROWS // SLAB)

    @pl.when(whole)
    def _():
        plgpu.copy_smem_to_gmem(chunk, y_ref.at[pl.ds(row, WG_ROWS), own])

    slab = lambda i: chunk.at[pl.ds(i * SLAB, SLAB)]

    @pl.when(jnp.logical_not(whole))
    def _():
        def one(i, _):
            plgpu.copy_smem_to_gmem(slab(i), y_ref.at[pl.ds(row + i * SLAB, SLAB), own])

        lax.fori_loop(first, last, one, None)

    def aside(bound, side, listed):
        here_too = (row <= bound) & (bound < row + WG_ROWS) & (lax.rem(bound, SLAB) != 0)

        @pl.when(listed & here_too)
        def _():
            part = slab((bound - row) // SLAB)
            plgpu.copy_smem_to_gmem(part, shared_ref.at[2 * here.group + side, :, own])

    aside(here.start, 0, here.end > here.start)
    aside(here.end, 1, here.end // SLAB * SLAB >= here.start)
