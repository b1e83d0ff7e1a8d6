"""The static facts of one attention call that its kernels are built for."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from sparsax.pallas.block_sparse.rules import PairRule
from sparsax.pallas.block_sparse.tiles import ROWS, Bounds


def whole_tiles(length: int) -> int:
    """A length, or the next one that row tiles divide."""
    return -(-length // ROWS) * ROWS


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and options; axis letters as in `sparsax.typing`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    P: int  # pattern heads
    dtype: jnp.dtype
    block_q: int
    block_kv: int
    scale: float
    left: int | None
    right: int | None
    ids: bool
    rule: PairRule | None = None  # what the ids are, if not ids
    samples: int = 1  # B where every sample has counts of its own
    packed: int = 0  # keys packed behind the sequence, whole row tiles
    rows: int = 0  # global rows, packed behind the queries, whole row tiles
    own: bool = False  # whether these see keys of their own, which stand behind all others
    whole_rows: bool = False  # whether tiles of global rows never need a mask

    @property
    def q_starts(self) -> tuple[int, ...]:
        """Positions where queries and global rows begin."""
        return (0, whole_tiles(self.T)) if self.rows else (0,)

    @property
    def q_lengths(self) -> tuple[int, ...]:
        """How many there are of each."""
        return (self.T, self.rows) if self.rows else (self.T,)

    @property
    def kv_starts(self) -> tuple[int, ...]:
        """Positions where keys, packed keys and those of global rows begin."""
        packed = whole_tiles(self.S)
        return 0, *([packed] if self.packed else []), *([packed + self.packed] if self.own else [])

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """How many there are of each."""
        return self.S, *([self.packed] if self.packed else []), *([self.S] if self.own else [])

    @property
    def rows_from(self) -> int:
        """Position of the first global row."""
        return self.q_starts[-1]

    @property
    def rows_ask(self) -> bool:
        """Whether the rule lets global rows see what it keeps from others; without it bits do."""
        return self.rows > 0 and self.rule is not None

    @property
    def packed_from(self) -> int:
        """Position of the first packed key."""
        return self.kv_starts[1]

    @property
    def rows_see_from(self) -> int:
        """Position of the first key that global rows see."""
        return self.kv_starts[-1] if self.own else 0

    @property
    def q_rows(self) -> int:
        """Positions of queries."""
        return self.q_starts[-1] + self.q_lengths[-1]

    @property
    def kv_rows(self) -> int:
        """Positions of keys."""
        return self.kv_starts[-1] + self.kv_lengths[-1]

    @property
    def key_ids(self) -> int:
        """How many ids a key has: 0, or as many as the rule reads."""
        return 0 if not self.ids else 1 if self.rule is None else self.rule.key_ids

    @property
    def query_ids(self) -> int:
        """How many ids a query has."""
        return 0 if not self.ids else 1 if self.rule is None else self.rule.query_ids

    def of_head(self, head):
        """Where the ids of a head stand: all may share them."""
        return head if self.rule is not None and self.rule.per_head else 0

    @property
    def owners(self) -> int:
        """Pattern heads of all samples with counts of their own: where there are lists to walk."""
        return self.samples * self.P

    @property
    def q_bounds(self) -> Bounds:
        """Rows are queries, columns keys."""
        return Bounds(
            self.q_rows, self.kv_rows, self.left, self.right, mask_tail=True, ids=self.ids,
            rule=self.rule,
        )  # fmt: skip

    @property
    def kv_bounds(self) -> Bounds:
        """Rows are keys, columns queries, whose tail has probability 0 and so needs no mask."""
        rule = self.rule and self.rule.turned()
        return Bounds(
            self.kv_rows, self.q_rows, self.right, self.left, mask_tail=False, ids=self.ids,
            rule=rule,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Columns:
    """How tiles of `tile` columns are made of the blocks that a list names.

    A block of more than `tile` columns is walked in parts; smaller ones are gathered, `gather` of
    them to a tile, wherever they lie.
    """

    block: int
    tile: int
    bounds: Bounds

    @property
    def parts(self) -> int:
        """Tiles that one block is walked in."""
        return max(1, self.block // self.tile)

    @property
    def gather(self) -> int:
        """Blocks that one tile gathers."""
        return max(1, self.tile // self.block)

    @property
    def width(self) -> int:
        """Columns of a tile that lie together in memory."""
        return min(self.block, self.tile)

    @property
    def ids_say_all(self) -> bool:
        """Whether what the ids say of a pair is all there is to ask, absent pieces among it."""
        rule = self.bounds.rule
        if rule is None or not rule.says_all:
            return False
        return not rule.keys_in_rows or self.gather == 1

    def masked(self, bits: bool) -> bool:
        """Whether any tile may need a mask: then the kernel has a second loop for those."""
        return bits or self.gather > 1 or self.bounds.partial(self.block)

    def tiles(self, entries):
        """Tiles that a list of so many entries takes."""
        return (entries + self.gather - 1) // self.gather * self.parts

    def span(self, first, last, entries):
        """Tiles of a list of so many entries that a range of units of work means."""
        per_unit = ROWS // self.tile
        end = self.tiles(entries)
        return jnp.minimum(first * per_unit, end), jnp.minimum(last * per_unit, end)

    def full_tiles(self, entries):
        """Tiles made of entries that need no mask alone, of which a list has so many."""
        return entries // self.gather * self.parts

    def entry(self, tile, piece: int):
        """Where in the list the piece of a tile stands."""
        return tile // self.parts * self.gather + piece

    def position(self, block, tile):
        """First column of the piece that a tile takes from a block."""
        return block * self.block + lax.rem(tile, jnp.int32(self.parts)) * self.tile
