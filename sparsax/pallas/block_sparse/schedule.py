"""Which thread block does which row tiles, and when.

The GPU hands thread blocks out in order, each as soon as a multiprocessor is free. A thread block
that does several tiles hides the loads of the next behind the current one, but many of them of
equal length leave multiprocessors idle at the end: so one for each multiprocessor does three
quarters of the tiles, and thread blocks of one tile each, handed out to whoever is done, even out
the rest. The long rows of every head start first, and are cut where one of them would outlast
everything else; the other rows of a head run together, since they share its columns in the L2
cache. Where it is known without the data that the last rows are the longest, they are done from the
last to the first, which needs no table.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import multiprocessors

LONG = 32  # units: where no list is longer, rows stay whole
PIECES = 4  # a row is cut into pieces of this fraction of what one multiprocessor does
EARLY = 8  # this fraction of each head's rows, the longest ones, is done before all others


class Item(NamedTuple):
    """What a thread block reads about one of its row tiles; scalars of the kernel."""

    row: Any  # -1: nothing to do
    owner: Any  # pattern head, or kv head where several pattern heads share one
    copy: Any
    first: Any  # the row's work from here
    last: Any  # to here
    part: Any  # where the sum of a piece goes; -1: this item is the whole row
    extra: tuple[Any, ...]  # what else was given for the row


class Expected(NamedTuple):
    """What is known of a head's lists without the data."""

    units: int = 0  # work of all of them
    longest_last: bool = False  # whether rows from the last to the first are an order to do them in


NOTHING = Expected()


def units(entries, block: int):
    """Work of a list of so many blocks: its columns in units of `ROWS`, whatever the tiles are.

    The tables of kernels with different tiles are then the same arrays, computed once.
    """
    per_unit = ROWS // block
    return (entries + per_unit - 1) // per_unit


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How row tiles are dealt to thread blocks.

    Each of `owners` heads has `tiles` row tiles, of `longest` units of work at most and together of
    what is `expected`, done for each of `copies` (samples, and heads that share the pattern). Where
    rows may be long and are few, one of more than its fair share of the work is cut into pieces,
    whose sums are added later, in order.
    """

    owners: int
    tiles: int
    copies: int
    longest: int
    expected: Expected = NOTHING

    @property
    def rows(self) -> int:
        """Row tiles of all owners."""
        return self.owners * self.tiles

    @property
    def extra(self) -> int:
        """Pieces that cutting may add: every piece of a row but its last is a whole share.

        0, and nothing is cut, where the copies of a row alone keep the GPU busy, or where no row
        should last longer than all the work does: the longest start first.
        """
        if self.longest < LONG or self.copies >= multiprocessors():
            return 0
        if self.longest * multiprocessors() <= self.expected.units * self.owners * self.copies:
            return 0
        return PIECES * multiprocessors() // self.copies

    @property
    def in_order(self) -> bool:
        """Whether rows are done from the last to the first, and there is no table."""
        return self.expected.longest_last and not self.extra

    @property
    def items(self) -> int:
        """Everything there may be to do, for every copy."""
        return (self.rows + self.extra) * self.copies

    @property
    def parts(self) -> int:
        """Places for the sums of pieces: the later ones of all rows, then the first ones."""
        return 2 * self.extra

    @property
    def early(self) -> int:
        """Ranks done head by head in turn; where all lists are short, the L2 cache holds all."""
        return self.tiles if self.longest < LONG else -(-self.tiles // EARLY)

    @property
    def dealt(self) -> int:
        """Items of each thread block that stays; there is one for each multiprocessor."""
        return 3 * self.rows * self.copies // (4 * multiprocessors())

    @property
    def staying(self) -> int:
        """Thread blocks that stay."""
        return multiprocessors() if self.dealt else 0

    @property
    def passing(self) -> int:
        """Thread blocks of one item, or of few where rows were cut."""
        return self.rows * self.copies - self.dealt * self.staying

    @property
    def left(self) -> int:
        """Items of a passing thread block at most."""
        return -(-(self.items - self.dealt * self.staying) // self.passing)

    @property
    def thread_blocks(self) -> int:
        """Thread blocks of the launch."""
        return self.staying + self.passing

    def read(self, block, slot, table, added, extra):
        """What `item` makes item number `slot` of a thread block of.

        From a reference to what `deal` wrote; `added` is its first number. Without a table `extra`,
        its last fields, are read where they are. Nothing here waits for what is read.
        """
        dealt, ahead = self.dealt * self.staying, self.owners * self.copies
        # Folded, so that a thread block gets long and short ones.
        fold = jnp.where(slot % 2 == 1, self.staying - 1 - block, block) + slot * self.staying
        stays = block < self.staying
        place = jnp.where(stays, fold, dealt + block - self.staying + slot * self.passing)
        pieces = added * self.copies  # the added ones, which come before all rows
        there = (slot < self._slots(stays)) & (place < pieces + self.rows * self.copies)
        place = jnp.where(there, place, 0)
        early = jnp.maximum(place - pieces, 0)
        later = jnp.maximum(early - self.early * ahead, 0)
        late = max(self.tiles - self.early, 1)
        is_early = early < self.early * ahead
        rank = jnp.where(is_early, early // ahead, self.early + lax.rem(later, jnp.int32(late)))
        owner = jnp.where(is_early, early // self.copies, later // late)
        owner = lax.rem(owner, jnp.int32(self.owners))
        copy = lax.rem(jnp.where(place < pieces, place, early), jnp.int32(self.copies))
        copy = jnp.where(is_early, copy, later // (late * self.owners))
        if self.in_order:
            row = self.tiles - 1 - rank
            whole = owner * self.tiles + row, jnp.int32(0), jnp.int32(self.longest), jnp.int32(-1)
            return there, copy, *whole, *(x[owner, row] for x in extra)
        index = self.extra + owner * self.tiles + rank
        index = jnp.where(place < pieces, place // self.copies, index)
        count = self.extra + self.rows
        return there, copy, *(table[1 + i * count + index] for i in range(4 + len(extra)))

    def item(self, there, copy, row, first, last, part, *more) -> Item:
        """An item from what `read` gives."""
        return Item(
            jnp.where(there, lax.rem(row, jnp.int32(self.tiles)), -1), row // self.tiles, copy,
            first, jnp.where(there, last, first), part, tuple(jnp.where(there, x, 0) for x in more),
        )  # fmt: skip

    def _slots(self, stays):
        return jnp.where(stays, jnp.int32(self.dealt), jnp.int32(self.left))

    def each(self, block, table, visit, carry, extra=()):
        """`visit(item, carry)` for the items of a thread block, each read one ahead.

        `extra` are references to what `deal` was given besides work.
        """
        added = jnp.int32(0) if self.in_order else table[0]
        read = lambda slot: self.read(block, slot, table, added, extra)

        def go(slot, state):
            fields, carry = state
            return read(slot + 1), visit(self.item(*fields), carry)

        start = read(jnp.int32(0)), carry
        return lax.fori_loop(0, self._slots(block < self.staying), go, start)[1]


def part_types(schedule: Schedule, *shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Float32 outputs of a kernel for the pieces of split rows, of such a shape each; if any."""
    places = schedule.parts * schedule.copies
    return tuple(jax.ShapeDtypeStruct((places, *s), jnp.float32) for s in shapes if places)
