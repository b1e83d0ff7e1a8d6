"""Products whose rows are sorted by group, each group with a matrix of its own.

x `[M, D]`, w `[G, D, F]`, y `[M, F]`, `group_sizes` `[G]`: data, so no shape depends on it.
`jax.lax.ragged_dot` masks x once per group outside of TPUs: G times the work and the memory. Here
each group's rows are walked in tiles instead, large ones first, so that the work is that of the
rows, rounded up to the smallest tile once a group, and no weight is copied more than once.
"""

import jax.numpy as jnp
from jax import lax

from sparsax.xla.walk import varying_zero

TILES = (512, 128, 32)  # rows of one product, largest first


def gmm(x, w, group_sizes, bias=None, *, transpose_w: bool = False):
    """`y[m] = x[m] w[g] + bias[g]` for row m of group g, in x's dtype; 0 past the last group."""
    rows, spec = x.shape[0], "md,fd->mf" if transpose_w else "md,df->mf"
    starts, ends = group_bounds(group_sizes, rows)
    x = jnp.pad(x, ((0, TILES[-1]), (0, 0)))

    def group(g, y):
        weights = w[g]

        def visit(row, tile, y):
            # A group's last tile may reach into the next group, whose own tiles then overwrite it.
            part = _matmul(spec, lax.dynamic_slice_in_dim(x, row, tile), weights)
            part = part if bias is None else part + bias[g].astype(jnp.float32)
            return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), row, 0)

        return _each_tile(starts[g], ends[g], rows, visit, y)

    y = _zeros((x.shape[0], w.shape[1 if transpose_w else 2]), x.dtype, x, w, group_sizes, bias)
    y = lax.fori_loop(0, w.shape[0], group, y)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], y, 0)


def tgmm(x, dy, group_sizes):
    """`out[g] = x[rows of g].T @ dy[rows of g]`, `[G, D, F]` in x's dtype."""
    rows = x.shape[0]
    starts, ends = group_bounds(group_sizes, rows)
    x, dy = (jnp.pad(a, ((0, TILES[-1]), (0, 0))) for a in (x, dy))
    zeros = _zeros((x.shape[1], dy.shape[1]), jnp.float32, x, dy, group_sizes)

    def group(_, bounds):
        start, end = bounds

        def visit(row, tile, total):
            own = row + jnp.arange(tile)[:, None] < end
            part = jnp.where(own, lax.dynamic_slice_in_dim(x, row, tile), 0)
            # What meets a 0 must be finite: another group's rows may not be.
            other = jnp.where(own, lax.dynamic_slice_in_dim(dy, row, tile), 0)
            return total + _matmul("md,mf->df", part, other)

        return None, _each_tile(start, end, rows, visit, zeros).astype(x.dtype)

    return lax.scan(group, None, (starts, ends))[1]


def group_sums(y, group_sizes):
    """`out[g] = sum of the rows of g`, float32 `[G, F]`, in a fixed order on every device."""
    starts, ends = group_bounds(group_sizes, y.shape[0])
    row = jnp.arange(y.shape[0])
    member = (starts[:, None] <= row) & (row < ends[:, None])
    inside = jnp.where((row < ends[-1])[:, None], y, 0)
    return _matmul("gm,mf->gf", member.astype(y.dtype), inside)


def group_bounds(group_sizes, rows: int):
    """First row and row past the last of every group, `[G]` each, cut off at `rows`."""
    ends = jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return jnp.minimum(starts, rows), jnp.minimum(ends, rows)


def _each_tile(start, end, rows: int, visit, carry):
    """`carry = visit(first row, tile, carry)` for tiles that cover the rows from start to end."""
    for tile in TILES:
        last = tile == TILES[-1]
        if tile > rows and not last:
            continue  # no group can fill it
        steps = (end - start + (tile - 1 if last else 0)) // tile
        step = lambda i, carry, tile=tile, start=start: visit(start + i * tile, tile, carry)
        carry = lax.fori_loop(0, steps, step, carry)
        start = start + steps * tile
    return carry


def _zeros(shape, dtype, *like):
    return jnp.full(shape, varying_zero(*like), dtype)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
