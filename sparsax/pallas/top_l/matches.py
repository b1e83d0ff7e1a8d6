"""Which pairs are kept, by the number of their codes that are equal.

Score and position make one number, as in `sparsax.patterns.topl`, of which a query keeps what is
not below its threshold. The kernels read of a query its packed codes, its threshold and its place;
of a key its packed codes and its place.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from sparsax.pallas.block_sparse.problem import whole_tiles
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import per_col, per_row
from sparsax.quantise.codes import Codes

MAX_CODES = 16  # of a token and head: two words
PLACE_BITS = 24  # of a number, below those of the score
# The place of a key that is none. Less than any threshold, whatever codes count for it, since a
# threshold is at least -MAX_CODES << PLACE_BITS; and neither the place of a query.
NOWHERE = -(1 << 29)


def codes_refusal(codes: Codes) -> str | None:
    """Why kernels cannot compare these codes; None if they can."""
    if codes.score != "match":
        return f'has kernels of score="match" alone; got codes of score="{codes.score}"'
    if codes.num_codes > MAX_CODES:
        return f"takes at most {MAX_CODES} codes of a token and head; got {codes.num_codes}"
    if codes.keys.shape[1] >= 1 << PLACE_BITS:
        return f"takes lengths below {1 << PLACE_BITS}; got {codes.keys.shape[1]}"
    return None


def differing(mine, others):
    """How many codes of pairs differ, from their words; one or two arrays of int32 each.

    The sum over the digits of a number is a product's highest digit: unlike the count of bits it
    does not wait for the unit that the exponentials keep busy.
    """
    unequal = [_unequal(a, b) for a, b in zip(mine, others, strict=True)]
    if len(unequal) == 1:
        return _right(unequal[0] * 0x11111111, 28)
    total = unequal[0] + unequal[1]
    total = (total + _right(total, 4)) & 0x0F0F0F0F  # up to 16 takes more than four bits
    return _right(total * 0x01010101, 24)


def _unequal(a, b):
    """1 in the lowest of each four bits that differ, else 0."""
    x = a ^ b
    x |= _right(x, 1)
    x |= _right(x, 2)
    return x & 0x11111111


def _right(x, bits: int):
    return lax.shift_right_logical(x, jnp.full_like(x, bits))


@dataclasses.dataclass(frozen=True)
class Matches:
    """The rule of the kernels: scores from a threshold on, and the own key.

    Attributes:
        words: packed codes of a token and head.
        causal: whether a query sees only its own place and below.
        keys_in_rows: whether the rows of a tile are keys, as for dK and dV.
    """

    words: int
    causal: bool
    keys_in_rows: bool = False

    @property
    def query_ids(self) -> int:
        """Codes, threshold, place."""
        return self.words + 2

    @property
    def key_ids(self) -> int:
        """Codes, place."""
        return self.words + 1

    @property
    def per_head(self) -> bool:
        """Every head has codes of its own."""
        return True

    @property
    def blocks(self) -> bool:
        """The lists hold all blocks."""
        return False

    @property
    def says_all(self) -> bool:
        """Keys past the end have no place."""
        return True

    def turned(self) -> "Matches":
        """The rule for tiles whose rows are keys."""
        return dataclasses.replace(self, keys_in_rows=True)

    def keep(self, rows, cols, listed, shape: tuple[int, ...]):
        """Boolean matrix of the pairs that attend."""
        along_q, along_k = (per_col, per_row) if self.keys_in_rows else (per_row, per_col)
        queries, keys = (cols, rows) if self.keys_in_rows else (rows, cols)
        *mine, threshold, own = (along_q(x, shape) for x in queries)
        *others, place = (along_k(x, shape) for x in keys)
        kept = place - differing(mine, others) * (1 << PLACE_BITS) >= threshold
        if self.causal:
            kept &= place < own
        return kept | (place == own)


def words_of(packed: UInt32[Array, "B T N W"]) -> Int[Array, "B N W positions"]:
    """Packed codes as the kernels read them, up to whole row tiles."""
    words = jnp.moveaxis(jax.lax.bitcast_convert_type(packed, jnp.int32), 1, 3)
    return _whole(words, 0)


def key_ids(
    packed: UInt32[Array, "B S K W"], key_mask: Bool[Array, "B S"] | None
) -> Int[Array, "B K ids positions"]:
    """What the rule reads of keys; one row tile more than there are, of such that none sees."""
    length = packed.shape[1]
    places = jnp.broadcast_to(jnp.arange(length), (packed.shape[0], length))
    places = places if key_mask is None else jnp.where(key_mask, places, NOWHERE)
    found = _with(words_of(packed), [_whole(places[:, None], NOWHERE)])
    return jnp.pad(found, ((0, 0), (0, 0), (0, 0), (0, ROWS)), constant_values=NOWHERE)


def query_ids(
    packed: UInt32[Array, "B T N W"],
    tau: Int[Array, "B T N"],
    first: Int[Array, "B T N"],
    num_codes: int,
) -> Int[Array, "B N ids positions"]:
    """What the rule reads of queries."""
    # The score counts down from M, the number of codes, by those that differ: M is taken away.
    threshold = (tau - num_codes) * (1 << PLACE_BITS) + first
    places = jnp.arange(packed.shape[1])[None, None]
    return _with(words_of(packed), [_whole(threshold.swapaxes(1, 2), 0), _whole(places, -1)])


def _with(words, vectors):
    """The words, and behind them vectors `[B or 1, N or 1, positions]`."""
    shape = *words.shape[:2], 1, words.shape[3]
    more = [jnp.broadcast_to(x[:, :, None].astype(jnp.int32), shape) for x in vectors]
    return jnp.concatenate([words, *more], 2)


def _whole(x, fill: int):
    """Padded to whole row tiles along the last axis."""
    widths = *((0, 0),) * (x.ndim - 1), (0, whole_tiles(x.shape[-1]) - x.shape[-1])
    return jnp.pad(x, widths, constant_values=fill)
