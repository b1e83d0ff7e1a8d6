"""Compound attention over a dense mask, differentiated by JAX itself."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def compound_attention(q, k, v, q_global, k_global, v_global, mask, places, *, scale):
    """`o` of a dense softmax over `mask [B or 1, P, T, T]`.

    `places [B or 1, R, T]` is True where slot r of `q_global [B, R, N, H]` is row t: those rows are
    computed with the projections of their own.
    """
    o = _attend(q, k, v, mask, scale)
    if q_global is None:
        return o
    places = jnp.broadcast_to(places, (len(q), *places.shape[1:])).astype(jnp.float32)
    queries = jnp.einsum("brt,brnh->btnh", places, q_global, precision=HIGHEST)
    rows = _attend(queries, k_global, v_global, mask, scale)
    return jnp.where(places.any(1)[:, :, None, None], rows, o)


def _attend(q, k, v, mask, scale):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1)
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=HIGHEST)
    top = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e30)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    probs = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnts,bsnh->btnh", probs, v, precision=HIGHEST)
