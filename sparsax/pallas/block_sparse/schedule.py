"""Which thread block does which row tiles, and when.

The GPU hands thread blocks out in order, each as soon as a multiprocessor is free. A thread block
that does several tiles hides the loads of the next behind the current one, but many of them of
equal length leave multiprocessors idle at the end: so one for each multiprocessor does most of the
tiles, and thread blocks of one tile for each of their teams, handed out to whoever is done, even
out the rest. The long rows of every head start first, and are cut where one of them would outlast
everything else; the other rows of a head run together, since they share its columns in the L2
cache. Few rows for each are all done by thread blocks that stay, for one of a single tile hides
nothing: in order of length and back again, so that each gets long ones and short ones, but for who
has a row longer than the mean load, which is all that team does. Where the work of rows is known
without the data, all of them are dealt beforehand, evenly.
"""

import dataclasses
import functools
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import multiprocessors

LONG = 32  # units: where no list is longer, rows stay whole
PIECES = 4  # a row is cut into pieces of this fraction of what one multiprocessor does
OF_ROW = 1.5  # units that a row costs besides its list, by measurement with 64 features
STAY = 4  # rows for each multiprocessor: up to so many, teams that stay do all; by measurement
STAY_CACHED = 8  # the same where heads need not take turns for their columns to be in the L2 cache
HEADER = 3  # numbers before the fields of a table: added pieces, and rows done alone by teams
EARLY = 8  # this fraction of each head's rows, the longest ones, is done before all others


class Item(NamedTuple):
    """What a team reads about one of its row tiles; scalars of the kernel."""

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
    of_rows: tuple[int, ...] = ()  # of each, where it is known so well that they are dealt by it


NOTHING = Expected()


def units(entries, block: int):
    """Work of a list of so many blocks: its columns in units of `ROWS`, whatever the tiles are.

    The tables of kernels with different tiles then say the same.
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
    teams: int = 1  # of a thread block, which do their row tiles on their own
    twentieths: int = 19  # of all row tiles, which teams that stay do
    single: bool = False  # whether no team has more than one row: nothing is dealt
    cached: bool = False  # whether the L2 cache holds the columns of all heads

    @property
    def rows(self) -> int:
        """Row tiles of all owners."""
        return self.owners * self.tiles

    @property
    def extra(self) -> int:
        """Pieces that cutting may add: so many that none need be longer than a share of the work.

        0, and nothing is cut, where the copies of a row alone keep the GPU busy, or where no row
        should last longer than all the work does: the longest start first.
        """
        if self.longest < LONG or self.copies >= multiprocessors():
            return 0
        if self.longest * multiprocessors() <= self.expected.units * self.owners * self.copies:
            return 0
        most = PIECES * multiprocessors() // self.copies
        # Where there are several for each, rows of up to twice the mean length even out uncut.
        several = self.rows * self.copies >= 2 * multiprocessors()
        return min(most, self.rows // 2) if several else most

    @property
    def beforehand(self) -> bool:
        """Whether who does which rows is known without the data."""
        return self.single or (bool(self.expected.of_rows) and not self.extra)

    def in_any_order(self) -> "Schedule":
        """Itself, or the one of single rows where there are so few."""
        few = not self.extra and self.rows * self.copies <= self.teams * multiprocessors()
        return dataclasses.replace(self, single=few)

    def hands(self) -> np.ndarray:
        """What each team does in turn where rows are dealt beforehand: numbers `[turns, teams]`.

        They are of rows and copies; -1 is nothing.
        """
        blocks = min(multiprocessors(), self.rows * self.copies)
        return _evenly(self.expected.of_rows, self.owners, self.copies, blocks * self.teams)

    @property
    def stay(self) -> bool:
        """Whether teams that stay do all there is; all rows are ranked together then."""
        most = STAY_CACHED if self.cached else STAY
        return self.rows * self.copies <= most * multiprocessors() and not self.beforehand

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
        """Items of each team that stays; each multiprocessor has those of one thread block.

        Of few rows these are the most that any has, if all share alike.
        """
        if self.beforehand:
            return 1 if self.single else len(self.hands())
        if self.stay:
            return -(-self.items // self.staying)
        return self.twentieths * self.rows * self.copies // (20 * multiprocessors() * self.teams)

    @property
    def staying(self) -> int:
        """Teams that stay."""
        if self.single or self.stay:
            return self.teams * min(multiprocessors(), self.items)
        if self.beforehand:
            return self.hands().shape[1]
        return multiprocessors() * self.teams if self.dealt else 0

    @property
    def passing(self) -> int:
        """Teams of one item, or of few where rows were cut."""
        if self.beforehand or self.stay:
            return 0
        return self.rows * self.copies - self.dealt * self.staying

    @property
    def left(self) -> int:
        """Items of a passing team at most."""
        return -(-(self.items - self.dealt * self.staying) // self.passing) if self.passing else 0

    @property
    def thread_blocks(self) -> int:
        """Thread blocks of the launch."""
        return self._first_passing + self._passing_blocks

    @property
    def _first_passing(self) -> int:
        """The first thread block whose teams do not stay."""
        return self.staying // self.teams

    @property
    def _passing_blocks(self) -> int:
        """Thread blocks whose teams pass: as many as are busy at once, before any gets two."""
        return max(-(-self.passing // self.teams), min(self.passing, multiprocessors()))

    def number(self, block, team):
        """Which of all teams one of a thread block is: the first ones of all blocks come first.

        So where there is little to do, and for the longest rows, each has a multiprocessor.
        """
        if self.teams == 1:
            return block
        first, passing = self._first_passing, block - self._first_passing
        passing = self.staying + passing + team * self._passing_blocks
        return jnp.where(block < first, block + team * first, passing)

    def look(self, team, slot, table):
        """What `read` has to know of an item; nothing where the item's number says it all."""
        if not self.beforehand:
            return None
        place = jnp.minimum(slot, self.dealt - 1) * self.staying + team
        there = (slot < self.dealt) & (team < self.staying)
        return jnp.where(there, table[jnp.minimum(place, self.dealt * self.staying - 1)], -1)

    def header(self, table):
        """Of the table: added pieces, and teams that do a long row and nothing else.

        None where rows are dealt beforehand.
        """
        if self.beforehand:
            return None
        if self.extra:
            return table[0], 0
        return 0, table[self.teams] * self.copies if self.stay else 0

    def read(self, team, slot, seen, table, header, extra):
        """What `item` makes item number `slot` of a team of.

        From a reference to what `deal` wrote; `header` is its own, and `seen` what `look` saw. Of
        rows that are dealt beforehand `extra`, the last fields, are read where they are. Nothing
        here waits for what is read.
        """
        if self.beforehand:
            seen = jnp.where(team < self.rows * self.copies, team, -1) if self.single else seen
            number = jnp.maximum(seen, 0)
            index, copy = number // self.copies, lax.rem(number, jnp.int32(self.copies))
            owner, row = index // self.tiles, lax.rem(index, jnp.int32(self.tiles))
            whole = index, jnp.int32(0), jnp.int32(self.longest), jnp.int32(-1)
            return seen >= 0, copy, *whole, *(x[owner, row] for x in extra)
        added, alone = header
        if self.stay:
            rest = self.staying - alone  # teams that may have a second item
            back = jnp.where(slot % 2 == 1, rest - 1 - (team - alone), team - alone)
            place = jnp.where(slot == 0, team, self.staying + (slot - 1) * rest + back)
            there = place < (added + self.rows) * self.copies
            place = jnp.where(there, place, 0)
            index, copy = place // self.copies, lax.rem(place, jnp.int32(self.copies))
            index = jnp.where(index < added, index, self.extra + index - added)
            return there, copy, *self._fields(table, index, 4 + len(extra))
        dealt, ahead = self.dealt * self.staying, self.owners * self.copies
        # Folded, so that a team gets long and short ones.
        fold = jnp.where(slot % 2 == 1, self.staying - 1 - team, team) + slot * self.staying
        stays = team < self.staying
        place = jnp.where(stays, fold, dealt + team - self.staying + slot * self.passing)
        pieces = added * self.copies  # the added ones, which come before all rows
        there = (slot < self.slots(team, header)) & (place < pieces + self.rows * self.copies)
        if self.teams > 1:
            there &= team < self.staying + self.passing
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
        index = self.extra + owner * self.tiles + rank
        index = jnp.where(place < pieces, place // self.copies, index)
        return there, copy, *self._fields(table, index, 4 + len(extra))

    def _fields(self, table, index, many: int):
        return (table[HEADER + i * (self.extra + self.rows) + index] for i in range(many))

    def item(self, there, copy, row, first, last, part, *more) -> Item:
        """An item from what `read` gives."""
        return Item(
            jnp.where(there, lax.rem(row, jnp.int32(self.tiles)), -1), row // self.tiles, copy,
            first, jnp.where(there, last, first), part, tuple(jnp.where(there, x, 0) for x in more),
        )  # fmt: skip

    def slots(self, team, header):
        """Items of a team, at most."""
        if self.stay:
            added, alone = header
            rest = jnp.int32(self.staying - alone)
            later = jnp.maximum((added + self.rows) * self.copies - self.staying, 0)
            return jnp.where(team < alone, 1, 1 + lax.div(later + rest - 1, rest))
        return jnp.where(team < self.staying, jnp.int32(self.dealt), jnp.int32(self.left))

    def each(self, team, table, visit, carry, extra=()):
        """`visit(item, carry)` for the items of a team, each read one ahead if there are several.

        `extra` are references to what `deal` was given besides work.
        """
        if self.single:  # no loop, which would hold what comes next in registers
            return visit(self.item(*self.read(team, 0, None, table, None, extra)), carry)
        header = self.header(table)
        look = lambda slot: self.look(team, slot, table)
        read = lambda slot, seen: self.read(team, slot, seen, table, header, extra)

        def go(slot, state):
            seen, fields, carry = state
            ahead = read(slot + 1, seen)
            return look(slot + 2), ahead, visit(self.item(*fields), carry)

        first, second = jnp.int32(0), jnp.int32(1)
        start = look(second), read(first, look(first)), carry
        return lax.fori_loop(0, self.slots(team, header), go, start)[2]


@functools.lru_cache
def _evenly(of_rows: tuple[int, ...], owners: int, copies: int, teams: int) -> np.ndarray:
    """`Schedule.hands`: always the row that takes longest, to who has least to do."""
    tiles = len(of_rows)
    # Rows of one head are dealt one after another, and so run at the same time.
    every = [
        (-of_rows[row], copy, owner, row)
        for copy in range(copies) for owner in range(owners) for row in range(tiles)
    ]  # fmt: skip
    busy, hands = [(0.0, team) for team in range(teams)], [[] for _ in range(teams)]
    for work, copy, owner, row in sorted(every):
        load, team = busy[0]
        hands[team].append((owner * tiles + row) * copies + copy)
        heapq.heapreplace(busy, (load - work + OF_ROW, team))
    turns = max(map(len, hands))
    return np.array([hand + [-1] * (turns - len(hand)) for hand in hands], np.int32).T


def part_types(schedule: Schedule, *shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Float32 outputs of a kernel for the pieces of split rows, of such a shape each; if any."""
    places = schedule.parts * schedule.copies
    return tuple(jax.ShapeDtypeStruct((places, *s), jnp.float32) for s in shapes if places)
