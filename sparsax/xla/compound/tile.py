"""Attention of one tile, its gradients, and the sum of tiles over other keys of the same queries.

q, o, do     [..., G, q, H]     G  query heads of a kv head
k, v         [..., s, H]        q, s  queries and keys of the tile
lse, delta   [..., G, q]        keep  broadcasts to [..., G, q, s]
"""

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -1e30  # finite, so that exp(-inf - LOWEST) is 0 where -inf - -inf would be NaN


def attend(q, k, v, keep, scale):
    """`(o, lse)` in float32 over the tile's keys; a query that keeps none has o = 0, lse = -inf."""
    s = jnp.where(keep, scale * matmul("...gqh,...sh->...gqs", q, k), -jnp.inf)
    top = jnp.maximum(s.max(-1), LOWEST)
    p = jnp.exp(s - top[..., None])
    total = p.sum(-1)
    some = jnp.where(total > 0, total, 1.0)
    o = matmul("...gqs,...sh->...gqh", p.astype(v.dtype), v) / some[..., None]
    return o, jnp.where(total > 0, top + jnp.log(some), -jnp.inf)


def gradients(q, k, v, keep, do, lse, delta, scale):
    """`(dq, dk, dv)` in float32; `lse` is that of all keys, +inf for queries that keep none.

    Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1.2: ds = p (dp - delta).
    """
    s = scale * matmul("...gqh,...sh->...gqs", q, k)
    p = jnp.where(keep, jnp.exp(s - lse[..., None]), 0.0)
    dp = matmul("...gqh,...sh->...gqs", do, v)
    ds = (scale * p * (dp - delta[..., None])).astype(q.dtype)
    dq = matmul("...gqs,...sh->...gqh", ds, k)
    dk = matmul("...gqs,...gqh->...sh", ds, q)
    dv = matmul("...gqs,...gqh->...sh", p.astype(q.dtype), do)
    return dq, dk, dv


def merge(parts):
    """`(o, lse)` over all keys from those of disjoint parts: o = sum of exp(lse_s - lse) o_s."""
    outputs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    top = jnp.maximum(lses.max(0), LOWEST)
    weights = jnp.exp(lses - top)
    total = weights.sum(0)
    some = jnp.where(total > 0, total, 1.0)
    o = (outputs * (weights / some)[..., None]).sum(0)
    return o, jnp.where(total > 0, top + jnp.log(some), -jnp.inf)


def cut(x, start, size, axis):
    """A slice of static size along one axis."""
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def add_at(x, start, values, axis):
    """`x` with `values` added from `start` on along one axis."""
    old = lax.dynamic_slice_in_dim(x, start, values.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + values, start, axis)


def pad(x, before, after, axis):
    """`x` with zeros (False) before and after it along one axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def join(tiles, axis, length):
    """Tiles stacked along axis 0 put side by side along `axis` of one tile, cut to `length`."""
    axis %= tiles.ndim - 1
    x = jnp.moveaxis(tiles, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def split_heads(x, groups):
    """`[B, T, N, H]` as `[B, K, N/K, T, H]`."""
    batch, length, heads, features = x.shape
    return x.reshape(batch, length, groups, heads // groups, features).transpose(0, 2, 3, 1, 4)


def join_heads(x):
    """`[B, K, G, T, H]` as `[B, T, N, H]`; the inverse of `split_heads`."""
    batch, groups, share, length, features = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * share, features)


def by_group(mask, groups):
    """A mask per head `[N, ...]` as `[K, N/K, ...]`; of one for all heads, `[1, 1, ...]`."""
    return mask[None] if len(mask) == 1 else mask.reshape(groups, -1, *mask.shape[1:])


def matmul(spec, a, b):
    """An einsum whose sums are float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
