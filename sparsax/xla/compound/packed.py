"""Few queries or few keys: dense attention between all of them, a tile of queries at a time.

Selected columns are gathered keys that all queries meet; global rows are gathered queries that
meet all keys. q `[B, K, G, Q, H]`, k and v `[B, K, S, H]`.
"""

import jax.numpy as jnp
from jax import lax

from sparsax.xla.compound.tile import attend, cut, gradients, join, pad
from sparsax.xla.walk import varying_zero

SCORES = 1 << 15  # of one head and one tile, so that memory does not grow with Q * S


def forward(q, k, v, keep, scale):
    """`(o, lse)`; `keep(rows [tile])` are the pairs of these queries, `[B, K, G, tile, S]`."""
    tile, steps = _tiles(q, k)
    qs = pad(q, 0, steps * tile - q.shape[-2], -2)

    def visit(i):
        return attend(cut(qs, i * tile, tile, -2), k, v, keep(i * tile + jnp.arange(tile)), scale)

    o, lse = lax.map(visit, jnp.arange(steps))
    return join(o, -2, q.shape[-2]), join(lse, -1, q.shape[-2])


def backward(q, k, v, do, lse, delta, keep, scale):
    """`(dq, dk, dv)` of the same pairs."""
    tile, steps = _tiles(q, k)
    extra = steps * tile - q.shape[-2]
    qs, dos = (pad(x, 0, extra, -2) for x in (q, do))
    lses, deltas = (pad(x, 0, extra, -1) for x in (lse, delta))

    def visit(sums, i):
        start = i * tile
        dq, *add = gradients(
            cut(qs, start, tile, -2), k, v, keep(start + jnp.arange(tile)),
            cut(dos, start, tile, -2), cut(lses, start, tile, -1), cut(deltas, start, tile, -1),
            scale,
        )  # fmt: skip
        return tuple(x + y for x, y in zip(sums, add, strict=True)), dq

    zeros = jnp.zeros(k.shape)
    zeros = zeros + varying_zero(q, k, v, do, lse, delta, keep(jnp.arange(1)))
    (dk, dv), dq = lax.scan(visit, (zeros, zeros), jnp.arange(steps))
    return join(dq, -2, q.shape[-2]), dk, dv


def _tiles(q, k):
    tile = min(q.shape[-2], max(8, min(128, SCORES // k.shape[-2])))
    return tile, -(-q.shape[-2] // tile)
