"""All parts of a compound pattern, and its global rows: forward and backward.

Each part answers for the pairs that it owns, with a softmax of its own; `merge` joins them to the
one softmax over all. Going back, every part computes its probabilities from the joint log-sum-exp,
so the gradients just add up.
"""

import jax
import jax.numpy as jnp

from sparsax.compound import slots
from sparsax.xla import block_sparse_attention as block_sparse
from sparsax.xla.compound import band, elements, packed
from sparsax.xla.compound.pairs import Pairs
from sparsax.xla.compound.tile import by_group, join_heads, merge, split_heads


def forward(q, k, v, pattern, *, scale):
    """`(o [B, T, N, H], lse [B, N, T])`; global and padded rows have o = 0 and lse = -inf."""
    pairs, (qs, ks, vs) = Pairs(pattern), _split(q, k, v)
    parts = []
    if pattern.blocks is not None:
        lists, static = _blocks(pattern, scale)
        o, lse = block_sparse.forward(q, k, v, *lists[:2], pairs.q_ids, pairs.kv_ids, **static)
        parts.append((split_heads(o, ks.shape[1]).astype(jnp.float32), lse.reshape(qs.shape[:-1])))
    for index in range(len(pattern.bands)):
        parts.append(band.forward(qs, ks, vs, pairs, index, scale))
    if pattern.columns.shape[-1]:
        columns = _Columns(pattern, pairs, qs)
        taken = columns.take(ks), columns.take(vs)
        parts.append(packed.forward(qs, *taken, columns.keep, scale))
    if pattern.elements is not None:
        parts.append(elements.forward(qs, ks, vs, pairs, pattern.elements, scale))
    nothing = jnp.zeros(qs.shape), jnp.full(qs.shape[:-1], -jnp.inf)
    o, lse = merge(parts or [nothing])
    return join_heads(o).astype(q.dtype), lse.reshape(*lse.shape[:1], -1, lse.shape[-1])


def backward(q, k, v, o, lse, do, pattern, *, scale):
    """`(dq, dk, dv)`."""
    pairs, (qs, ks, vs) = Pairs(pattern), _split(q, k, v)
    dos, joint, delta = _rest(o, lse, do, ks.shape[1])
    found = []
    if pattern.blocks is not None:
        lists, static = _blocks(pattern, scale)
        blocks = block_sparse.backward(
            q, k, v, o, lse, do, jnp.zeros_like(lse), *lists, pairs.q_ids, pairs.kv_ids, **static
        )
        found.append(_split(*blocks))
    for index in range(len(pattern.bands)):
        found.append(band.backward(qs, ks, vs, dos, joint, delta, pairs, index, scale))
    if pattern.columns.shape[-1]:
        columns = _Columns(pattern, pairs, qs)
        taken = columns.take(ks), columns.take(vs)
        dq, *rest = packed.backward(qs, *taken, dos, joint, delta, columns.keep, scale)
        found.append((dq, *(columns.put(x, ks.shape) for x in rest)))
    if pattern.elements is not None:
        found.append(
            elements.backward(qs, ks, vs, dos, joint, delta, pairs, pattern.elements, scale)
        )
    nothing = [jnp.zeros(x.shape) for x in (qs, ks, vs)]
    return _join([sum(x) for x in zip(*found or [nothing], strict=True)], (q, k, v))


def rows_forward(q, k, v, pattern, *, scale):
    """`(o [B, R, N, H], lse [B, N, R])` of queries gathered at the pattern's global rows."""
    qs, ks, vs = _split(q, k, v)
    o, lse = packed.forward(qs, ks, vs, _rows_keep(pattern, len(q)), scale)
    return join_heads(o).astype(q.dtype), lse.reshape(*lse.shape[:1], -1, lse.shape[-1])


def rows_backward(q, k, v, o, lse, do, pattern, *, scale):
    """`(dq, dk, dv)`, dq of the gathered queries."""
    qs, ks, vs = _split(q, k, v)
    dos, joint, delta = _rest(o, lse, do, ks.shape[1])
    keep = _rows_keep(pattern, len(q))
    return _join(packed.backward(qs, ks, vs, dos, joint, delta, keep, scale), (q, k, v))


def _split(q, k, v):
    groups = k.shape[2]
    return split_heads(q, groups), *(split_heads(x, groups)[:, :, 0] for x in (k, v))


def _join(found, like):
    heads = (found[0], *(x[:, :, None] for x in found[1:]))
    return tuple(join_heads(x).astype(y.dtype) for x, y in zip(heads, like, strict=True))


def _rest(o, lse, do, groups):
    """do, lse (+inf where nothing is kept, so that p = 0) and delta, by kv head."""
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1).swapaxes(1, 2)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    by_head = lambda x: x.reshape(x.shape[0], groups, -1, x.shape[-1])
    return split_heads(do, groups), by_head(lse), by_head(delta)


def _blocks(pattern, scale):
    blocks = pattern.blocks.invalidate(~pattern.blocks.valid())
    lists = blocks.kv_num_blocks, blocks.kv_indices, blocks.q_num_blocks, blocks.q_indices
    sizes = {"block_q": blocks.block_q, "block_kv": blocks.block_kv}
    return lists, {**sizes, "scale": scale, "causal": pattern.causal, "window": None}


class _Columns:
    """The keys that all queries see, gathered: `[B, K, G, H]`."""

    def __init__(self, pattern, pairs, q):
        self.pairs, (batch, self.groups, self.share, *_) = pairs, q.shape
        self.slots = slots(pattern.columns, pattern.num_columns, pattern.seq_len, batch)

    def take(self, x):
        get = lambda x, i: x.at[:, i].get(mode="fill", fill_value=0, unique_indices=True)
        return jax.vmap(get)(x, self.slots)

    def put(self, x, shape):
        zeros = jnp.zeros_like(x, shape=shape)
        add = lambda z, i, x: z.at[:, i].add(x, mode="drop", unique_indices=True)
        return jax.vmap(add)(zeros, self.slots, x)

    def keep(self, rows):
        """The pairs of these queries that no block and no band owns, `[B, K, G, tile, columns]`."""
        queries = self.pairs.query(rows)

        def of_sample(slots, index):
            gap = slots - rows[:, None]
            mask = ~self.pairs.in_bands(gap)
            mask &= (gap <= 0) if self.pairs.causal else True
            sample = lambda mask: mask[jnp.minimum(index, len(mask) - 1)]
            mask &= sample(queries)[:, None] & sample(self.pairs.key(slots))
            heads = self.groups * self.share
            listed = self.pairs.in_blocks(heads, rows[None, :, None], slots[None, None])
            return by_group(mask & ~listed, self.groups)

        return jax.vmap(of_sample)(self.slots, jnp.arange(len(self.slots)))


def _rows_keep(pattern, batch):
    """The pairs of global rows: `keep(slots [tile])` is `[B, 1, 1, tile, T]`."""
    rows = slots(pattern.rows, pattern.num_rows, pattern.seq_len, batch)
    pairs = Pairs(pattern)
    tokens = jnp.arange(pattern.seq_len)
    real = pairs.key(tokens)

    def keep(place):
        inside = place < rows.shape[-1]
        at = jnp.where(inside, rows[:, jnp.minimum(place, rows.shape[-1] - 1)], pattern.seq_len)
        mask = (at < pattern.seq_len)[..., None] & real[:, None]
        if pattern.causal:
            mask &= tokens <= at[..., None]
        if pattern.token_mask is not None:
            own = jnp.broadcast_to(real, (batch, pattern.seq_len))
            mask &= jnp.take_along_axis(own, jnp.minimum(at, pattern.seq_len - 1), 1)[..., None]
        return mask[:, None, None]

    return keep
