"""Attention over the best keys of every query, by sorting dense scores."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def top_l_attention(q, k, v, q_codes, k_codes, key_mask, *, keep, causal, scale):
    """Softmax over the `keep` best keys of a row by the number of equal codes, or by its tables."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v, k_codes = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v, k_codes))
    i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    if q_codes.ndim == 4:
        scores = (q_codes[:, :, None] == k_codes[:, None]).sum(-1)
    else:
        found = jnp.take_along_axis(q_codes[:, :, None], k_codes[:, None, ..., None], axis=-1)
        scores = found[..., 0].astype(jnp.int32).sum(-1)
    scores = jnp.where(i == j, 10**6, scores.transpose(0, 3, 1, 2))  # B T S N -> B N T S
    allowed = (j <= i) if causal else jnp.ones_like(i == j)
    allowed = allowed & (True if key_mask is None else key_mask[:, None, None, :])
    # A stable sort of the reversed row puts the most recent of equal scores first.
    order = jnp.argsort(-jnp.where(allowed, scores, -1)[..., ::-1], axis=-1, stable=True)
    kept = allowed & (jnp.argsort(order, axis=-1) < keep)[..., ::-1]
    logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=HIGHEST)
    p = jnp.where(kept, jax.nn.softmax(jnp.where(kept, logits, -1e30), axis=-1), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", p, v, precision=HIGHEST)
