"""Products of groups of rows: every row with every matrix, and what is not its own masked out."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def gmm(x, w, group_sizes, bias, *, transpose_w: bool):
    """`x[m] w[g] + bias[g]` for row m of group g, float32; 0 for rows of no group."""
    w = w.swapaxes(1, 2) if transpose_w else w
    member = _member(group_sizes, len(x))[..., None]
    y = _einsum("gmd,gdf->gmf", jnp.where(member, x, 0), w)
    y = y if bias is None else y + bias.astype(jnp.float32)[:, None]
    return jnp.where(member, y, 0).sum(0)


def tgmm(x, dy, group_sizes):
    """`x.T @ dy` of the rows of each group, `[G, D, F]`, float32."""
    member = _member(group_sizes, len(x))[..., None]
    return _einsum("gmd,gmf->gdf", jnp.where(member, x, 0), jnp.where(member, dy, 0))


def _member(group_sizes, rows):
    """`[G, M]`: True where row m is one of group g."""
    ends = jnp.cumsum(group_sizes)[:, None]
    row = jnp.arange(rows)
    return (ends - group_sizes[:, None] <= row) & (row < ends)


def _einsum(spec, a, b):
    return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision=HIGHEST)
