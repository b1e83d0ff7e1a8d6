"""Attention over a dense mask, differentiated by JAX itself."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def block_sparse_attention(q, k, v, mask, q_ids, kv_ids, *, scale, causal, window, pruned):
    """`(o, lse)` of a dense softmax; `mask [P, T, S]` holds the pairs that the pattern lists."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    kept = jnp.repeat(mask, q.shape[2] // mask.shape[0], axis=0)  # P T S -> N T S
    allowed = _allowed(q.shape[1], k.shape[1], q_ids, kv_ids, causal, window)[:, None]  # B 1 T S
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=HIGHEST)
    if pruned == "zero":  # a pruned pair keeps logit zero: it counts in the sum, never in o
        scores, kept = jnp.where(kept, scores, 0.0), jnp.ones_like(kept) & allowed
    else:
        kept = kept & allowed
    top = jnp.max(scores, axis=-1, keepdims=True, where=kept, initial=-1e30)
    weights = jnp.where(kept, jnp.exp(jnp.where(kept, scores - top, 0.0)), 0.0)
    total = weights.sum(-1)
    some = total > 0
    lse = jnp.where(some, top[..., 0] + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    weights = weights * mask.repeat(q.shape[2] // mask.shape[0], 0)
    probs = weights / jnp.where(some, total, 1.0)[..., None]
    return jnp.einsum("bnts,bsnh->btnh", probs, v, precision=HIGHEST), lse.swapaxes(1, 2)


def score_map(q, k, q_ids, kv_ids, *, scale, causal, per_head, pool):
    """Softmax probabilities of dense attention, averaged over batch (and heads): `[P, T, S]`.

    With `pool`, averaged over blocks of so many queries and keys as well.
    """
    q, k = (x.astype(jnp.float32) for x in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    allowed = _allowed(q.shape[1], k.shape[1], q_ids, kv_ids, causal, None)[:, None]
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=HIGHEST)
    probs = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    probs = jnp.where(allowed, probs, 0.0).mean(0)
    probs = probs if per_head else probs.mean(0, keepdims=True)
    if pool is not None:
        for axis in (1, 2):
            ends = list(range(pool, probs.shape[axis], pool))
            parts = [part.mean(axis, keepdims=True) for part in jnp.split(probs, ends, axis)]
            probs = jnp.concatenate(parts, axis)
    return probs


def _allowed(q_len, kv_len, q_ids, kv_ids, causal, window):
    """The pairs that causality, window and segments admit: `[B or 1, T, S]`."""
    i, j = jnp.arange(q_len)[:, None], jnp.arange(kv_len)
    left, right = (None, None) if window is None else window
    allowed = jnp.ones((1, q_len, kv_len), bool)
    allowed &= (j <= i) if causal else True
    allowed &= True if left is None else (j >= i - left)
    allowed &= True if right is None else (j <= i + right)
    return allowed if q_ids is None else allowed & (q_ids[:, :, None] == kv_ids[:, None, :])
