"""Which pairs a part may count: those that are allowed and that no earlier part owns."""

import jax.numpy as jnp

from sparsax.xla.walk import take


class Pairs:
    """The masks that the parts of a compound pattern share.

    Global rows keep no pair here: they are computed apart.

    Attributes:
        bands: the diagonals, static; a pair in several belongs to the first.
        causal: whether a query sees only its own index and below.
    """

    def __init__(self, pattern):
        real = pattern.token_mask
        real = jnp.ones((1, pattern.seq_len), bool) if real is None else real
        self.bands, self.causal, self.seq_len = pattern.bands, pattern.causal, pattern.seq_len
        self._queries, self._keys = real & ~pattern.is_row(), real
        self._columns = pattern.is_column() if pattern.columns.shape[-1] else None
        self._blocks = pattern.blocks

    @property
    def q_ids(self):
        """Ids `[B or 1, T]` that match those of the admitted keys, for `block_sparse_attention`."""
        return jnp.where(self._queries, 0, -2).astype(jnp.int32)

    @property
    def kv_ids(self):
        """Ids `[B or 1, T]` of the keys; -1 is padding."""
        return jnp.where(self._keys, 0, -1).astype(jnp.int32)

    def query(self, index):
        """True `[B or 1, *index]` where a query counts; False outside the sequence."""
        return self._at(self._queries, index)

    def key(self, index):
        """True `[B or 1, *index]` where a key counts; False outside the sequence."""
        return self._at(self._keys, index)

    def is_column(self, index):
        """True `[B or 1, *index]` where a key is one that all queries see."""
        if self._columns is None:
            return jnp.zeros((1, *index.shape), bool)
        return self._at(self._columns, index)

    def in_bands(self, gap):
        """True where a pair with `gap` = key index - query index lies in a band."""
        inside = jnp.zeros(gap.shape, bool)
        for band in self.bands:
            inside = inside | band.holds(gap)
        return inside

    def in_blocks(self, heads, q_index, kv_index):
        """True `[N or 1, ...]` where a pair's block is listed; indices broadcast to that."""
        if self._blocks is None:
            return jnp.zeros(jnp.broadcast_shapes(q_index.shape, kv_index.shape), bool)
        mask = self._blocks.to_block_mask()
        mask = mask if len(mask) == 1 else jnp.repeat(mask, heads // len(mask), axis=0)
        q_block, kv_block = q_index // self._blocks.block_q, kv_index // self._blocks.block_kv
        head = jnp.arange(len(mask)).reshape(-1, *(1,) * (max(q_index.ndim, kv_index.ndim) - 1))
        return mask.at[head, q_block, kv_block].get(mode="clip")

    def _at(self, kept, index):
        inside = (index >= 0) & (index < self.seq_len)
        found = take(kept.T, jnp.where(inside, index, 0))  # [*index, B or 1]
        return jnp.moveaxis(found & inside[..., None], -1, 0)
