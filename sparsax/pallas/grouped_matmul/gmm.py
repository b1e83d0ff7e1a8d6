"""`y[rows of g] = activation(sum of x[rows of g] w[g] + bias[g])`, rows of no group 0."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul import tables
from sparsax.pallas.grouped_matmul.product import (
    CHUNK,
    Plan,
    Shape,
    beside,
    each_chunk,
    product,
    raster,
    side_by_side,
    together,
    width_of,
)
from sparsax.pallas.grouped_matmul.tables import DEPTH
from sparsax.pallas.hopper import COL, COMPUTE, SLAB, WG_ROWS, padded_rows, per_col


def gmm(x, w, group_sizes, bias=None, *, transpose_w: bool, interpret=None):
    """`[M, F]` in x's dtype, of x `[M, D]` and w `[G, D, F]`, or `[G, F, D]` to be transposed."""
    options = {"transpose_w": transpose_w, "interpret": interpret}
    return gmm_sum(((x, (w,)),), group_sizes, (bias,), **options)


@functools.partial(jax.jit, static_argnames=("transpose_w", "activation", "interpret"))
def gmm_sum(terms, group_sizes, biases, *, transpose_w=False, activation=None, interpret=None):
    """`activation(z)`, z the sum of `x w + bias` over the terms `(x, (w,))`; rows as of `gmm`.

    Terms `(x, (w, v))` make two sums, z and u, with a bias (or None) each: `activation(u) * z`.
    Everything is summed and activated in registers, and x is read once for both.
    """
    rows = terms[0][0].shape[0]
    terms = [(padded_rows(x), matrices) for x, matrices in terms]
    padded = terms[0][0].shape[0]
    starts, ends = tables.bounds(group_sizes, rows)
    # Rows of no group are one more, of no steps and no bias.
    starts = jnp.concatenate([starts, ends[-1:]])
    ends = jnp.concatenate([ends, jnp.full_like(ends[:1], padded)])
    table = tables.row_tiles(starts, ends, padded)
    biases = [
        None if b is None else jnp.pad(b.astype(jnp.float32), ((0, 1), (0, 0))) for b in biases
    ]
    run = _kernel(terms, biases, transpose_w, ACTIVATIONS.get(activation or ""), interpret)
    y, shared = run(*jax.tree.leaves((terms, table, biases)))
    # Slabs that groups share were put aside: each group's rows of them find their place here.
    where = tables.shared_rows(starts, ends).reshape(-1)
    nowhere = padded + jnp.arange(where.size)
    where = jnp.where(where < 0, nowhere, where)
    values = shared.reshape(-1, y.shape[1])
    return y.at[where].set(values, mode="drop", unique_indices=True)[:rows]


class _Item(NamedTuple):
    group: Any
    slab: Any  # the tile's first
    column: Any  # in tiles; sizes are multiplied at use, which proves copies to be aligned
    place: Any  # in a pair, whose thread blocks share the columns; 0 where they share the rows
    start: Any  # of the group
    end: Any
    steps: Any


def _kernel(terms, biases, transpose_w: bool, activate, interpret):
    tree = jax.tree.structure((terms, 0, biases))
    x, (w, *_) = terms[0]
    rows, matrices = x.shape[0], len(biases)
    groups, columns = w.shape[0], w.shape[1 if transpose_w else 2]
    width, most = width_of(columns, matrices), tables.most_tiles(rows, groups + 1)
    wide, cluster = columns // width, side_by_side(columns // width)
    past = list(itertools.accumulate(x.shape[1] // DEPTH for x, _ in terms))  # steps of the terms

    def make(*refs):
        *operands, y_ref, shared_ref = refs
        sources, table, bias_refs = jax.tree.unflatten(tree, operands)

        def item(n):
            tile, column = raster(n, table[0], wide // cluster)
            column, place = column * cluster, 0
            if cluster > 1:
                # Two neighbouring columns of two paired tiles of rows are two items as well: each
                # is a column of both tiles, which takes fewer reads than both columns of a tile.
                place, me = table[1 + 4 * most + tile], beside(cluster)
                tile = tile + jnp.where(place > 0, 1 - place + me, 0)
                column = column + jnp.where(place > 0, place - 1, me)
            group, slab, start, end = (table[1 + i * most + tile] for i in range(4))
            steps = jnp.where(group < groups, past[-1], 0)
            return _Item(group, slab, column, place, start, end, steps)

        def fill(here, step, a, b, barrier):
            def from_term(x_ref, w_refs, step):
                inner, outer = pl.ds(step * DEPTH, DEPTH), pl.ds(here.column * width, width)
                part = (outer, inner) if transpose_w else (inner, outer)

                def copy(of_x, of_w):
                    for half in range(COMPUTE):
                        own = pl.ds(here.slab * SLAB + half * WG_ROWS, WG_ROWS)
                        plgpu.copy_gmem_to_smem(x_ref.at[own, inner], a.at[half], barrier, **of_x)
                    for i, w_ref in enumerate(w_refs):
                        source = w_ref.at[(here.group, *part)]
                        plgpu.copy_gmem_to_smem(source, b.at[i], barrier, **of_w)

                if cluster > 1:
                    pl.when(here.place > 0)(lambda: copy({}, together(cluster)))
                    pl.when(here.place == 0)(lambda: copy(together(cluster), {}))
                else:
                    copy({}, {})

            for source, first, end in zip(sources, [0, *past[:-1]], past, strict=True):
                pl.when((first <= step) & (step < end))(
                    functools.partial(from_term, *source, step - first)
                )

        def finish(here, totals):
            return _epilogue(here, totals, bias_refs, activate)

        def store(here, wg, total, staging):
            row, column = here.slab * SLAB + wg * WG_ROWS, here.column * width
            copy = lambda chunk, begin: _copy_out(
                here, row, column + begin, chunk, y_ref, shared_ref
            )
            each_chunk(total, staging, x.dtype, copy)

        def idle(here, wg):
            return here.slab * SLAB + wg * WG_ROWS >= here.end

        return Plan(table[0] * (wide // cluster), item, fill, finish, store, idle)

    shape = Shape(width, x.dtype, matrices, transpose_b=transpose_w, cluster=cluster)
    out = (
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        jax.ShapeDtypeStruct((2 * (groups + 1), SLAB, columns), x.dtype),
    )
    return product(make, shape, "gmm", most * (wide // cluster), out, interpret)


def _epilogue(here: _Item, totals, bias_refs, activate) -> jax.Array:
    """The tile of the result, of the sums of its matrices."""

    def add_bias(total, bias_ref):
        if bias_ref is None:
            return total
        width = total.shape[1]
        part = bias_ref.at[here.group, pl.ds(here.column * width, width)]
        return total + per_col(plgpu.load(part, layout=COL, optimized=False), total.shape)

    z, *gate = map(add_bias, totals, bias_refs)
    if gate:
        return activate(gate[0]) * z
    return z if activate is None else activate(z)


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
