"""Diagonals: every tile of queries meets one slice of keys, found by arithmetic alone.

A band of dilation d never mixes tokens of different index modulo d. Sorted by that residue class,
it is an ordinary band within each: q `[B, K, d, G, n, H]`, k and v `[B, K, d, n, H]`, n = T/d.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsax.xla.compound.tile import add_at, attend, by_group, cut, gradients, join, pad
from sparsax.xla.walk import varying_zero


def forward(q, k, v, pairs, index, scale):
    """`(o, lse)` over the pairs of band `index` that no block and no earlier band owns."""
    tiles = _Tiles(q, pairs, index)
    qs, ks, vs = tiles.queries(q), tiles.keys(k), tiles.keys(v)

    def visit(i):
        return attend(tiles.q_tile(qs, i), *tiles.kv_tiles(ks, vs, i), tiles.keep(i), scale)

    o, lse = lax.map(visit, jnp.arange(tiles.steps))
    return tiles.join(o), tiles.join(lse[..., None])[..., 0]


def backward(q, k, v, do, lse, delta, pairs, index, scale):
    """`(dq, dk, dv)` of the same pairs."""
    tiles = _Tiles(q, pairs, index)
    qs, dos, ks, vs = tiles.queries(q), tiles.queries(do), tiles.keys(k), tiles.keys(v)
    lses, deltas = (tiles.queries(x[..., None]) for x in (lse, delta))

    def visit(sums, i):
        dq, *add = gradients(
            tiles.q_tile(qs, i), *tiles.kv_tiles(ks, vs, i), tiles.keep(i), tiles.q_tile(dos, i),
            tiles.q_tile(lses, i)[..., 0], tiles.q_tile(deltas, i)[..., 0], scale,
        )  # fmt: skip
        start = tiles.start(i)
        return tuple(add_at(x, start, y, -2) for x, y in zip(sums, add, strict=True)), dq

    zeros = jnp.zeros(ks.shape) + varying_zero(q, k, v, do, lse, delta, tiles.keep(0))
    (dk, dv), dq = lax.scan(visit, (zeros, zeros), jnp.arange(tiles.steps))
    return tiles.join(dq), tiles.join_keys(dk), tiles.join_keys(dv)


class _Tiles:
    """How tokens are cut into residue classes and tiles, and joined again."""

    def __init__(self, q, pairs, index):
        self.pairs, self.band = pairs, pairs.bands[index]
        self.groups, self.share, self.length = q.shape[1:4]
        self.classes = self.band.dilation
        self.count = -(-self.length // self.classes)  # n
        span = self.band.left + self.band.right + 1
        # Half the span keeps what a tile computes in vain below half of what it keeps; a power of
        # two between 16 and 128, so that matmuls stay big enough and buffers small.
        self.tile = min(self.count, max(16, min(128, (1 << span.bit_length()) // 4)))
        self.steps = -(-self.count // self.tile)
        self.width = self.tile + span - 1
        self.front = max(self.band.left, 0)
        gap = np.arange(self.width) - self.band.left - np.arange(self.tile)[:, None]
        self.own = (gap >= -self.band.left) & (gap <= self.band.right)
        for earlier in pairs.bands[:index]:
            self.own &= ~np.asarray(earlier.holds(gap * self.classes))

    def start(self, i):
        return i * self.tile + self.front - self.band.left

    def queries(self, x):
        x = self._split(x)
        return pad(x, 0, self.steps * self.tile - self.count, -2)

    def keys(self, x):
        x = self._split(x[:, :, None])[:, :, :, 0]
        last = self.start(self.steps - 1) + self.width
        return pad(x, self.front, max(0, last - self.front - self.count), -2)

    def q_tile(self, x, i):
        return cut(x, i * self.tile, self.tile, -2)

    def kv_tiles(self, k, v, i):
        start = self.start(i)
        return cut(k, start, self.width, -2), cut(v, start, self.width, -2)

    def keep(self, i):
        """The pairs of tile i, `[B or 1, K or 1, d, G or 1, tile, width]`."""
        residue = jnp.arange(self.classes)[:, None]
        q_index = (i * self.tile + jnp.arange(self.tile)) * self.classes + residue
        kv_index = (i * self.tile - self.band.left + jnp.arange(self.width)) * self.classes
        kv_index = kv_index + residue
        queries, keys = self.pairs.query(q_index), self.pairs.key(kv_index)
        keep = self.own & queries[..., :, None] & keys[..., None, :]
        listed = self.pairs.in_blocks(
            self.groups * self.share, q_index[None, ..., :, None], kv_index[None, ..., None, :]
        )
        listed = by_group(listed, self.groups).swapaxes(1, 2)
        return keep[:, None, :, None] & ~listed

    def join(self, tiles):
        """Tiles of queries `[steps, B, K, d, G, tile, H]` as `[B, K, G, T, H]`."""
        return self._unsplit(join(tiles, -2, self.count))

    def join_keys(self, x):
        x = x[..., self.front : self.front + self.count, :]
        return self._unsplit(x[:, :, :, None])[:, :, 0]

    def _split(self, x):  # B K G T H -> B K d G n H
        x = pad(x, 0, self.count * self.classes - self.length, -2)
        x = x.reshape(*x.shape[:3], self.count, self.classes, x.shape[-1])
        return x.transpose(0, 1, 4, 2, 3, 5)

    def _unsplit(self, x):
        x = x.transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])[..., : self.length, :]
