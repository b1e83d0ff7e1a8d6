"""The probability map of dense attention, averaged while it is computed."""

import jax
import jax.numpy as jnp
from jax import lax

from sparsax.layouts import block_sizes
from sparsax.xla.walk import varying_zero

QUERY_CHUNK = 256


def score_map(q, k, q_ids, kv_ids, *, scale, causal, per_head, pool):
    """Mean softmax probabilities, float32 `[P, T, S]`, P = N per head, else 1.

    Scans over chunks of queries and over the batch: beside the result, only the rows of one chunk
    and one sample are held for all heads, `N * QUERY_CHUNK * S` numbers. With `pool`, chunks are
    whole blocks of queries, and the means `[P, I, J]` over blocks are all that leaves them.
    """
    batch, q_len, heads, _ = q.shape
    unit = pool or 1
    chunk = unit * max(1, min(QUERY_CHUNK, q_len) // unit)
    steps = -(-q_len // chunk)
    pad = steps * chunk - q_len
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    ids = None if q_ids is None else jnp.pad(q_ids, ((0, 0), (0, pad)), constant_values=-1)
    groups = k.shape[2]

    def rows(step):
        start = step * chunk

        def add_sample(total, sample):
            q_chunk = lax.dynamic_slice_in_dim(sample["q"], start, chunk)
            q_chunk = q_chunk.reshape(chunk, groups, heads // groups, -1)
            s = scale * jnp.einsum(
                "tkgh,skh->kgts", q_chunk, sample["k"], preferred_element_type=jnp.float32
            )
            keep = jnp.ones(s.shape[-2:], bool)
            if causal:
                keep &= jnp.arange(s.shape[-1]) <= (start + jnp.arange(chunk))[:, None]
            if ids is not None:
                mine = lax.dynamic_slice_in_dim(sample["q_ids"], start, chunk)
                keep &= mine[:, None] == sample["kv_ids"]
            p = jax.nn.softmax(jnp.where(keep, s, -1e30), axis=-1)
            p = jnp.where(keep, p, 0.0)  # a row with no key at all is zero, not uniform
            p = p.reshape(heads, *p.shape[-2:])
            return total + (p if per_head else p.sum(0, keepdims=True)), None

        samples = {"q": q, "k": k}
        if ids is not None:
            samples |= {"q_ids": ids, "kv_ids": kv_ids}
        zeros = jnp.zeros((heads if per_head else 1, chunk, k.shape[1]))
        zeros = zeros + varying_zero(q, k, q_ids, kv_ids)
        total = lax.scan(add_sample, zeros, samples)[0]
        return total if pool is None else _block_sums(total, start, q_len, pool)

    total = lax.map(rows, jnp.arange(steps)).swapaxes(0, 1)  # P steps chunk S
    total = total.reshape(total.shape[0], -1, total.shape[-1])[:, : -(-q_len // unit)]
    count = batch if per_head else batch * heads
    if pool is not None:
        count *= block_sizes(q_len, pool)[:, None] * block_sizes(k.shape[1], pool)
    return total / count


def _block_sums(rows, start, q_len, pool):
    """`[P, chunk / pool, J]` from rows `[P, chunk, S]`; those past the end count nothing."""
    heads, chunk, kv_len = rows.shape
    rows = jnp.where((start + jnp.arange(chunk) < q_len)[:, None], rows, 0.0)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -kv_len % pool)))
    return rows.reshape(heads, chunk // pool, pool, -1, pool).sum((2, 4))
