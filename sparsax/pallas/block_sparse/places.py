"""Which pairs attend by the places of query and key in the sequence, where places are data.

A kernel with `Places` reads the place of every query, and of every key what `Places.of_keys` makes
of its mark: its place and what it is. Keys may stand twice, as themselves and packed behind the
sequence together with other keys that all queries see; every pair then belongs to one of the two.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from sparsax.pallas.hopper import per_col, per_row

STRIDE = 1 << 26  # more than there are places
TAKEN = STRIDE  # added to the place of a key that is packed as well
PACKED = 2 * STRIDE  # added to the place of a packed key
NOWHERE = TAKEN + STRIDE - 1  # the mark of a key that no query sees


@dataclasses.dataclass(frozen=True)
class Places:
    """The pairs that attend: those of the bands, of listed blocks, and with packed keys.

    Attributes:
        bands: `(left, right)` of each: key places `q - left` to `q + right`.
        causal: whether a query sees only its own place and below.
        packed: whether there are packed keys; they stand for what no band holds.
        blocks: whether the bits of a list say which pairs are of listed blocks, and then attend
            unless their key is packed.
        keys_in_rows: whether the rows of a tile are keys, as for dK and dV.
    """

    bands: tuple[tuple[int, int], ...]
    causal: bool
    packed: bool
    blocks: bool
    keys_in_rows: bool = False

    @property
    def query_ids(self) -> int:
        """A query's place."""
        return 1

    @property
    def key_ids(self) -> int:
        """Two that make a range, or a mark."""
        return 2 if self.one_range else 1

    @property
    def per_head(self) -> bool:
        """All heads see the same places."""
        return False

    @property
    def says_all(self) -> bool:
        """Whether nothing else need be asked."""
        return self.one_range

    def turned(self) -> "Places":
        """The rule for tiles whose rows are keys."""
        return dataclasses.replace(self, keys_in_rows=True)

    def keep(self, rows, cols, listed, shape: tuple[int, ...]):
        """Boolean matrix of the pairs that attend, from the vectors of its rows and columns.

        Those are one of queries, their places, and those of keys that `of_keys` gives.
        """
        along_q, along_k = (per_col, per_row) if self.keys_in_rows else (per_row, per_col)
        (places,), keys = (cols, rows) if self.keys_in_rows else (rows, cols)
        if self.one_range:
            first, length = keys
            return along_q(places, shape) - along_k(first, shape) <= along_k(length, shape)
        (marks,) = keys
        gap = along_k(marks & (STRIDE - 1), shape) - along_q(places, shape)
        marks = along_k(marks, shape)
        kept: Any = None
        for left, right in self.bands:
            band = (gap >= -left) & (gap <= right)
            kept = band if kept is None else kept | band
        if self.packed:
            packed = marks >= PACKED
            kept = packed if kept is None else kept ^ packed
        if self.blocks:
            listed &= marks < TAKEN
            kept = listed if kept is None else kept | listed
        if kept is None:
            return gap >= STRIDE  # never
        if self.causal:
            kept &= gap <= 0
        return kept

    def seen_by_global_rows(self, rows, cols, shape: tuple[int, ...]):
        """The same of global rows, which see every key but those that no query sees."""
        along_q, along_k = (per_col, per_row) if self.keys_in_rows else (per_row, per_col)
        (places,), keys = (cols, rows) if self.keys_in_rows else (rows, cols)
        if self.one_range:
            place = keys[0] + wrapped(self.bands[0][1] - (1 << 31))
        else:
            place = keys[0] & (STRIDE - 1)
        if not self.causal:
            places = jnp.full_like(places, STRIDE // 2)
        return along_k(place, shape) <= along_q(places, shape)

    @property
    def one_range(self) -> bool:
        """Whether every key is seen by places of one range, cyclic ones among them."""
        if self.blocks or len(self.bands) != 1:
            return False
        return not (self.packed and self.causal) or self.bands[0][1] == 0

    def of_keys(self, marks):
        """What the kernels read of keys: their marks, `[..., 1, keys]`, or with one range two.

        These are `(first, length)`: the place q sees the key if `q - first <= length`, in numbers
        of 32 bits, which go round: first is moved by half of them, so that one comparison does.
        What a packed key's band leaves is such a range as well.
        """
        if not self.one_range:
            return marks[..., None, :]
        return jnp.stack(self._range(marks), -2)

    def _range(self, marks):
        (left, right), half = self.bands[0], 1 << 31
        place = marks & (STRIDE - 1)
        first, length = place - wrapped(right - half), left + right - half
        if not self.packed:
            return first, jnp.full_like(place, wrapped(length))
        packed = marks >= PACKED
        rest = half - 1 if self.causal else (1 << 32) - 2 - (left + right)
        return (
            jnp.where(packed, place + wrapped(left + 1 + half), first),
            jnp.where(packed, wrapped(rest - half), wrapped(length)),
        )


def wrapped(x: int) -> int:
    """The number of 32 bits with sign that equals a number but for what they cannot hold."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
