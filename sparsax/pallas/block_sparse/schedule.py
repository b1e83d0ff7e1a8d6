"""Which thread block does which row tiles, and when.

The GPU hands thread blocks out in order, each as soon as a multiprocessor is free. A thread block
that does several tiles hides the loads of the next behind the current one, but many of them of
equal length leave multiprocessors idle at the end: so one for each multiprocessor does three
quarters of the tiles, and thread blocks of one tile each, handed out to whoever is done, even out
the rest. Long rows start first, and are cut where one of them would outlast everything else; tiles
of one head run together, since they share its columns in the L2 cache.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import multiprocessors

LONG = 2  # a row tile with this many times the mean work starts before all others
PIECES = 4  # a row is cut into pieces of this fraction of what one multiprocessor does
LEAST = 8  # but of no less than this work: each costs about as much as two units more
FEW = 8192  # so many numbers are ranked and summed by looking at every pair of them


class Item(NamedTuple):
    """What a thread block reads about one of its row tiles; scalars of the kernel."""

    row: Any  # -1: nothing to do
    owner: Any  # pattern head, or kv head where several pattern heads share one
    copy: Any
    first: Any  # the row's work from here
    last: Any  # to here
    part: Any  # where the sum of a piece goes; -1: this item is the whole row
    extra: tuple[Any, ...]  # what else was given for the row


def units(entries, block: int):
    """Work of a list of so many blocks: its columns in units of `ROWS`, whatever the tiles are.

    The tables of kernels with different tiles are then the same arrays, computed once.
    """
    per_unit = ROWS // block
    return (entries + per_unit - 1) // per_unit


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How row tiles are dealt to thread blocks.

    Each of `owners` heads has `tiles` row tiles, of `longest` units of work at most, done for each
    of `copies` (samples, and heads that share the pattern). With `split`, a row of more than its
    fair share of the work is cut into pieces, whose sums are added later, in order.
    """

    owners: int
    tiles: int
    copies: int
    longest: int
    split: bool = False

    @property
    def rows(self) -> int:
        """Row tiles of all owners."""
        return self.owners * self.tiles

    @property
    def extra(self) -> int:
        """Pieces that cutting may add: every piece of a row but its last is a whole share.

        0 where the copies of a row alone keep the GPU busy: then nothing is cut.
        """
        few = self.copies < multiprocessors()
        return PIECES * multiprocessors() // self.copies if self.split and few else 0

    @property
    def items(self) -> int:
        """Everything there may be to do, for every copy."""
        return (self.rows + self.extra) * self.copies

    @property
    def parts(self) -> int:
        """Places for the sums of pieces: the later ones of all rows, then the first ones."""
        return 2 * self.extra

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

    def table(
        self, work: Int[Array, "A R"], *extra: Int[Array, "A R"]
    ) -> tuple[Int[Array, " F"], Int[Array, "2 E"] | None]:
        """What `read` reads; and for each added piece, if it is a row's second, row and additions.

        `work` is the units of each row's list, `extra` what else its kernel wants to know of it.
        """
        work, others = work.reshape(-1), [x.reshape(-1) for x in extra]
        total, here = work.sum(), jnp.arange(self.rows)
        row, first, last, part, splits = here, 0 * work, work, 0 * work - 1, None
        if self.extra:
            row, first, last, part, splits = self._cut(work, total)
            own = jnp.minimum(row, self.rows - 1)
            others = [x[own] for x in others]
        weight = jnp.where(row < self.rows, last - first, -1)
        long = weight * self.rows > LONG * total
        # Long ones first, whatever their head; then head after head, long before short.
        owner = jnp.minimum(row // self.tiles, self.owners - 1)
        key = jnp.where(long, self.owners, self.owners - 1 - owner) * (self.longest + 1) + weight
        order = _descending(jnp.where(weight < 0, -1, key))
        fields = jnp.where(row < self.rows, row, -1), first, last, part, *others
        columns = [long.sum()[None], *(x[order] for x in fields)]
        return jnp.concatenate([c.astype(jnp.int32) for c in columns]), splits

    def _cut(self, work, total):
        """Fields of all items, the added pieces last, and the table of splits."""
        share = jnp.maximum(LEAST, -(-total // self.extra))  # so at most `extra` are added
        more = jnp.maximum(work - 1, 0) // share
        ends = _running_sum(more)
        nth = jnp.arange(self.extra)
        row = (ends <= nth[:, None]).sum(-1)  # `rows` where there is no piece
        own = jnp.minimum(row, self.rows - 1)
        number = nth - (ends - more)[own] + 1
        length = -(-work // (more + 1))
        first = jnp.minimum(number * length[own], work[own])
        last = jnp.minimum(first + length[own], work[own])
        part = jnp.where(more > 0, self.extra + ends - more, -1)
        second = (row < self.rows) & (number == 1)
        splits = jnp.stack([own, jnp.where(second, more[own], 0)]).astype(jnp.int32)
        with_whole = lambda whole, pieces: jnp.concatenate([whole, pieces])
        return (
            with_whole(jnp.arange(self.rows), row), with_whole(0 * work, first),
            with_whole(jnp.minimum(length, work), last), with_whole(part, nth), splits,
        )  # fmt: skip

    def read(self, block, slot, table, extra: int) -> Item:
        """Item number `slot` of a thread block, from a reference to the table."""
        count, dealt = self.rows + self.extra, self.dealt * self.staying
        # Folded, so that a thread block gets long and short ones.
        fold = jnp.where(slot % 2 == 1, self.staying - 1 - block, block) + slot * self.staying
        stays = block < self.staying
        place = jnp.where(stays, fold, dealt + block - self.staying + slot * self.passing)
        there = (slot < self._slots(stays)) & (place < self.items)
        place = jnp.where(there, place, 0)
        long = table[0]
        rest = jnp.maximum(count - long, 1)
        after = place - long * self.copies
        early, later = after < 0, jnp.maximum(after, 0)
        rank = jnp.where(early, place // self.copies, long + lax.rem(later, rest))
        copy = jnp.where(early, lax.rem(place, jnp.int32(self.copies)), later // rest)
        row, first, last, part, *more = (table[1 + i * count + rank] for i in range(4 + extra))
        there &= row >= 0
        safe = jnp.maximum(row, 0)
        return Item(
            jnp.where(there, lax.rem(safe, jnp.int32(self.tiles)), -1), safe // self.tiles, copy,
            first, jnp.where(there, last, first), part, tuple(jnp.where(there, x, 0) for x in more),
        )  # fmt: skip

    def _slots(self, stays):
        return jnp.where(stays, jnp.int32(self.dealt), jnp.int32(self.left))

    def each(self, block, table, visit, carry, extra: int = 0):
        """`visit(item, carry)` for the items of a thread block, each read one ahead."""

        def go(slot, state):
            item, carry = state
            return self.read(block, slot + 1, table, extra), visit(item, carry)

        start = self.read(block, jnp.int32(0), table, extra), carry
        return lax.fori_loop(0, self._slots(block < self.staying), go, start)[1]


def part_types(schedule: Schedule, *shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Float32 outputs of a kernel for the pieces of split rows, of such a shape each; if any."""
    places = schedule.parts * schedule.copies
    return tuple(jax.ShapeDtypeStruct((places, *s), jnp.float32) for s in shapes if places)


def _descending(key: Int[Array, " M"]) -> Int[Array, " M"]:
    """Where each rank is, from the largest key down, ties in place.

    A few of them by counting who comes before, which is two small kernels and no sort.
    """
    count = key.shape[0]
    if count > FEW:
        return jnp.argsort(-key, stable=True)
    here = jnp.arange(count, dtype=jnp.int32)
    before = (key > key[:, None]) | ((key == key[:, None]) & (here < here[:, None]))
    rank = before.sum(-1, dtype=jnp.int32)
    return jnp.where(rank == here[:, None], here, 0).sum(-1)


def _running_sum(x: Int[Array, " M"]) -> Int[Array, " M"]:
    """The sum up to each number; of a few of them in one kernel, where a scan takes several."""
    if x.shape[0] > FEW:
        return jnp.cumsum(x)
    here = jnp.arange(x.shape[0])
    return jnp.where(here <= here[:, None], x, 0).sum(-1)
