"""Single pairs: every query gathers its keys, and for dk and dv every key gathers its queries.

Gathering in both directions instead of scattering gradients: no atomics, the same bits twice. Heads
are all alike here, with the kv heads repeated for their query heads:

    q, k, v, do   [B, N, T, H]        gathered   [B, N, tile, E, H]
    lists         [N or 1, T, E], N when heads have lists or blocks of their own
"""

import jax.numpy as jnp
from jax import lax

from sparsax.xla.compound.tile import attend, gradients, join

TILE = 64


def forward(q, k, v, pairs, lists, scale):
    """`(o, lse)` over the listed pairs that no other part owns."""
    shape, (q, k, v) = q.shape, _per_head(q, k, v)
    walk = _Lines(q, pairs, lists.kv_num_blocks, lists.kv_indices)

    def visit(i):
        rows, index, used = walk.tile(i)
        keep = used & walk.admitted(rows[:, None], index)
        o, lse = attend(walk.own(q, rows)[..., None, None, :], walk.listed(k, index),
                        walk.listed(v, index), keep[..., None, None, :], scale)  # fmt: skip
        return o[..., 0, 0, :], lse[..., 0, 0]

    o, lse = lax.map(visit, jnp.arange(walk.steps))
    o, lse = join(o, 2, walk.length), join(lse, 2, walk.length)
    return o.reshape(shape), lse.reshape(shape[:-1])


def backward(q, k, v, do, lse, delta, pairs, lists, scale):
    """`(dq, dk, dv)` of the same pairs."""
    q_shape, k_shape, (q, k, v) = q.shape, k.shape, _per_head(q, k, v)
    do, lse, delta = (x.reshape(*q.shape[:3], *x.shape[4:]) for x in (do, lse, delta))
    by_query = _Lines(q, pairs, lists.kv_num_blocks, lists.kv_indices)
    by_key = _Lines(q, pairs, lists.q_num_blocks, lists.q_indices)

    def visit_queries(i):
        rows, index, used = by_query.tile(i)
        keep = used & by_query.admitted(rows[:, None], index)
        mine = lambda x: by_query.own(x, rows)
        dq, _, _ = gradients(
            mine(q)[..., None, None, :], by_query.listed(k, index), by_query.listed(v, index),
            keep[..., None, None, :], mine(do)[..., None, None, :], mine(lse)[..., None, None],
            mine(delta)[..., None, None], scale,
        )  # fmt: skip
        return dq[..., 0, 0, :]

    def visit_keys(i):
        rows, index, used = by_key.tile(i)
        keep = used & by_key.admitted(index, rows[:, None])
        found = lambda x: by_key.listed(x, index)[:, :, :, None]  # one head, E queries
        _, dk, dv = gradients(
            found(q), by_key.own(k, rows)[..., None, :], by_key.own(v, rows)[..., None, :],
            keep[..., None, :, None], found(do), found(lse), found(delta), scale,
        )  # fmt: skip
        return dk[..., 0, :], dv[..., 0, :]

    dq = join(lax.map(visit_queries, jnp.arange(by_query.steps)), 2, by_query.length)
    found = lax.map(visit_keys, jnp.arange(by_key.steps))
    batch, groups, length, features = k_shape
    dk, dv = (join(x, 2, length).reshape(batch, groups, -1, length, features).sum(2) for x in found)
    return dq.reshape(q_shape), dk, dv


def _per_head(q, k, v):
    batch, groups, share, *rest = q.shape
    return q.reshape(batch, groups * share, *rest), *(jnp.repeat(x, share, 1) for x in (k, v))


class _Lines:
    """The lists of one direction, walked a tile of lines (queries or keys) at a time."""

    def __init__(self, q, pairs, counts, lists):
        self.pairs, self.heads, self.length = pairs, q.shape[1], q.shape[2]
        repeat = 1 if len(lists) == 1 else self.heads // len(lists)
        self.counts, self.lists = (jnp.repeat(x, repeat, axis=0) for x in (counts, lists))
        self.size = min(TILE, self.length)
        self.steps = -(-self.length // self.size)

    def tile(self, i):
        """`(rows [tile], index [N or 1, tile, E], used [N or 1, tile, E])`."""
        rows = i * self.size + jnp.arange(self.size)
        at = jnp.minimum(rows, self.length - 1)  # lines past the end are computed and cut off
        used = jnp.arange(self.lists.shape[-1]) < self.counts[:, at, None]
        return at, self.lists[:, at], used

    def admitted(self, q_index, kv_index):
        """`[B or 1, N or 1, tile, E]`: allowed, and owned by no other part."""
        gap = kv_index - q_index
        keep = ~self.pairs.in_bands(gap)
        keep &= (gap <= 0) if self.pairs.causal else True
        keep &= ~self.pairs.in_blocks(self.heads, q_index, kv_index)
        q_index, kv_index = (jnp.broadcast_to(x, gap.shape) for x in (q_index, kv_index))
        keep = keep & self.pairs.query(q_index) & self.pairs.key(kv_index)
        return keep & ~self.pairs.is_column(kv_index)

    def own(self, x, rows):
        return x[:, :, rows]

    def listed(self, x, index):
        return x[:, jnp.arange(self.heads)[:, None, None], index]
