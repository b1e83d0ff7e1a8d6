"""Attention over single kept keys: scores are computed again from the codes, tile by tile.

Dao, "FlashAttention-2" (arXiv 2307.08691), with whole rows: a tile of queries meets all keys at
once, so that no running maximum is needed. Held at once, beside arrays of the length:
`[B, K, G, tile, S]`, K * G heads.
"""

import jax.numpy as jnp
from jax import lax

from sparsax.quantise.codes import (
    is_kept,
    join_rows,
    ready_keys,
    split_rows,
    tile_rows,
    tile_scores,
)
from sparsax.xla.walk import varying_zero


def top_l_forward(q, k, v, queries, keys, tau, first, key_mask, *, num_codes, scale, causal):
    """`(o [B, T, N, H], lse [B, T, N])`; a row that keeps nothing has o = 0 and lse = -inf."""
    kept_of = _Kept(queries, keys, key_mask, num_codes, causal)

    def tile(step):
        rows, qs, *selection = step
        s = scale * _matmul("btkgh,bskh->bkgts", _grouped(qs, k), k)
        s = jnp.where(kept_of(rows, *selection), s, -jnp.inf)
        top = jnp.maximum(s.max(-1), -1e30)  # finite, so that exp(-inf - top) is 0
        p = jnp.exp(s - top[..., None])
        total = p.sum(-1)
        some = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)
        p = p / some[..., None]
        o = _matmul("bkgts,bskh->btkgh", p.astype(v.dtype), v)
        lse = jnp.moveaxis(lse, 3, 1).reshape(qs.shape[:3])
        return o.reshape(qs.shape).astype(q.dtype), lse

    o, lse = lax.map(tile, _tiles(q, queries, tau, first))
    return join_rows(o, q.shape[1]), join_rows(lse, q.shape[1])


def top_l_backward(
    q, k, v, o, lse, do, queries, keys, tau, first, key_mask, *, num_codes, scale, causal
):
    """`(dq, dk, dv)`; probabilities are computed again from `lse`, tiles are summed in order."""
    kept_of = _Kept(queries, keys, key_mask, num_codes, causal)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # no key: every probability is zero

    def tile(carry, step):
        (rows, qs, *selection), dos, lses, deltas = step
        qg, dog = _grouped(qs, k), _grouped(dos, k)
        kept = kept_of(rows, *selection)
        s = scale * _matmul("btkgh,bskh->bkgts", qg, k)
        p = jnp.where(kept, jnp.exp(s - _rows(lses, k.shape[2])[..., None]), 0.0)
        dp = _matmul("btkgh,bskh->bkgts", dog, v)
        ds = (scale * p * (dp - _rows(deltas, k.shape[2])[..., None])).astype(q.dtype)
        dk = carry[0] + _matmul("bkgts,btkgh->bskh", ds, qg)
        dv = carry[1] + _matmul("bkgts,btkgh->bskh", p.astype(q.dtype), dog)
        dq = _matmul("bkgts,bskh->btkgh", ds, k)
        return (dk, dv), dq.reshape(qs.shape).astype(q.dtype)

    zero = varying_zero(q, k, v, o, lse, do, queries, keys, tau, first, key_mask)
    tile_of = lambda x: split_rows(x, tile_rows(q.shape[1]))
    steps = _tiles(q, queries, tau, first), *map(tile_of, (do, lse, delta))
    zeros = jnp.zeros(k.shape) + zero
    (dk, dv), dq = lax.scan(tile, (zeros, zeros), steps)
    return join_rows(dq, q.shape[1]), dk.astype(k.dtype), dv.astype(v.dtype)


class _Kept:
    """Which pairs of a tile of queries and all keys are kept, `[B, K, G, t, S]`."""

    def __init__(self, queries, keys, key_mask, num_codes, causal):
        self.ready, self.key_mask = ready_keys(queries, keys, num_codes), key_mask
        self.static = {"num_codes": num_codes, "causal": causal}

    def __call__(self, rows, queries, tau, first):
        scores = tile_scores(queries, self.ready, rows, self.key_mask, **self.static)
        tau, first = (_rows(x, self.ready.shape[1]) for x in (tau, first))
        return is_kept(scores, tau, first)


def _tiles(q, queries, tau, first):
    rows = tile_rows(q.shape[1])
    cut = tuple(split_rows(x, rows) for x in (q, queries, tau, first))
    positions = jnp.arange(cut[0].shape[0] * rows).reshape(-1, rows)
    return positions, *cut


def _grouped(x, k):
    """`[B, t, N, H]` by kv head: `[B, t, K, G, H]`."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def _rows(x, kv_heads):
    """`[B, t, N]` by kv head, rows last: `[B, K, G, t]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1), 1, 3)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
