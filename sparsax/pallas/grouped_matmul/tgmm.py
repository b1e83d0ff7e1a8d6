"""`out[g] = x[rows of g].T @ dy[rows of g]`: the sum runs over as many rows as the group has."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
from sparsax.pallas.hopper import COMPUTE, ROWS, SLAB, WG_ROWS, padded_rows


@functools.partial(jax.jit, static_argnames="interpret")
def tgmm(x, dy, group_sizes, *, interpret=None):
    """`[G, D, F]` in x's dtype, of x `[M, D]` and dy `[M, F]`; 0 for groups without rows."""
    rows = x.shape[0]
    starts, ends = tables.bounds(group_sizes, rows)
    # What no whole step takes, fewer than 72 rows a group, is gathered with zeros after it: then
    # no row of another group is ever multiplied, be it masked or not.
    at_ends = tables.rows_at_ends(starts, ends)
    gather = lambda a: jnp.where((at_ends < 0)[..., None], 0, a[jnp.maximum(at_ends, 0)])
    x_ends, dy_ends = gather(x), gather(dy)
    x, dy = padded_rows(x), padded_rows(dy)
    (out,) = _kernel(x, dy, len(group_sizes), interpret)(
        x, dy, x_ends, dy_ends, tables.steps(starts, ends)
    )
    return out


class _Item(NamedTuple):
    group: Any
    part: Any  # of the result's rows, one for each warpgroup
    column: Any  # in tiles
    slab: Any  # of x and dy, the first of the whole steps
    whole: Any  # steps from there
    steps: Any


def _kernel(x, dy, groups: int, interpret):
    features, columns = x.shape[1], dy.shape[1]
    width, high = width_of(columns), -(-features // ROWS)
    cluster = side_by_side(high)
    wide, high = columns // width, high // cluster

    def make(x_ref, dy_ref, x_ends, dy_ends, table, out_ref):
        def item(n):
            group = n // (high * wide)
            row, column = raster(n - group * high * wide, high, wide)
            slab, whole, steps = (table[i * groups + group] for i in range(3))
            part = (row * cluster + beside(cluster)) * COMPUTE
            return _Item(group, part, column, slab, whole, steps)

        def fill(here, step, a, b, barrier):
            def from_rows(x_rows, dy_rows):
                for half in range(COMPUTE):
                    # Past the features any others do: nothing of these sums is stored.
                    own = jnp.minimum(here.part + half, features // WG_ROWS - 1)
                    part = x_rows(pl.ds(own * WG_ROWS, WG_ROWS))
                    plgpu.copy_gmem_to_smem(part, a.at[half], barrier)
                columns_here = dy_rows(pl.ds(here.column * width, width))
                plgpu.copy_gmem_to_smem(columns_here, b.at[0], barrier, **together(cluster))

            @pl.when(step < here.whole)
            def _():
                own = pl.ds(here.slab * SLAB + step * DEPTH, DEPTH)
                from_rows(lambda f: x_ref.at[own, f], lambda f: dy_ref.at[own, f])

            @pl.when(step >= here.whole)
            def _():
                own = pl.ds((step - here.whole) * DEPTH, DEPTH)
                g = here.group
                from_rows(lambda f: x_ends.at[g, own, f], lambda f: dy_ends.at[g, own, f])

        def store(here, wg, total, staging):
            row = (here.part + wg) * WG_ROWS

            def copy(chunk, begin):
                @pl.when(row < features)
                def _():
                    own = pl.ds(row, WG_ROWS), pl.ds(here.column * width + begin, CHUNK)
                    plgpu.copy_smem_to_gmem(chunk, out_ref.at[(here.group, *own)])

            each_chunk(total, staging, x.dtype, copy)

        return Plan(jnp.int32(groups * high * wide), item, fill, lambda _, totals: totals[0], store)

    shape = Shape(width, x.dtype, transpose_a=True, cluster=cluster)
    out = (jax.ShapeDtypeStruct((groups, features, columns), x.dtype),)
    return product(make, shape, "tgmm", groups * high * wide, out, interpret)
