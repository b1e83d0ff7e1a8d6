"""Which thread block does which row tiles, and when.

The GPU hands thread blocks out in order, each as soon as a multiprocessor is free. So long rows
must start early, and be split where one of them would outlast everything else; a thread block that
does several tiles hides the loads of the next behind the current one; and tiles of one head should
run together, since they share its columns in the L2 cache.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

LONG = 2  # a row tile with this many times the mean work starts before all others
WAVES = 2  # thread blocks for each multiprocessor that leave room for balance
MULTIPROCESSORS = 132  # of an H100 or H200; merely sets how much is dealt to a thread block


class Item(NamedTuple):
    """What a thread block reads about one of its row tiles; scalars of the kernel."""

    row: Any  # -1: nothing to do
    owner: Any  # pattern head, or kv head where several pattern heads share one
    copy: Any
    first: Any  # tiles of the row's list from here
    last: Any  # to here
    part: Any  # where a split row's sum goes; -1: this item is the whole row
    extra: tuple[Any, ...]  # what else was given for the row


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How row tiles are dealt to thread blocks.

    Each of `owners` heads has `tiles` row tiles, done for each of `copies` (samples, and heads
    that share the pattern). With `split`, a row of more than its fair share of the work is cut
    into parts, whose sums are added later, in order.
    """

    owners: int
    tiles: int
    copies: int
    split: bool = False

    @property
    def rows(self) -> int:
        """Row tiles of all owners."""
        return self.owners * self.tiles

    @property
    def extra(self) -> int:
        """Items that splitting may add: every part but a row's last holds a share of the work.

        0 where the copies alone keep the GPU busy: then nothing is split.
        """
        return WAVES * MULTIPROCESSORS // self.copies if self.split else 0

    @property
    def items(self) -> int:
        """Everything there is to do, for every copy."""
        return (self.rows + self.extra) * self.copies

    @property
    def parts(self) -> int:
        """Parts of split rows; there are at most `extra` such rows."""
        return 2 * self.extra

    @property
    def size(self) -> int:
        """Items of a thread block: few enough that the last ones to start can even things out."""
        return min(4, max(1, self.items // (4 * MULTIPROCESSORS)))

    @property
    def thread_blocks(self) -> int:
        """Thread blocks of the launch."""
        return -(-self.items // self.size)

    def table(
        self, work: Int[Array, "A R"], *extra: Int[Array, "A R"]
    ) -> tuple[Int[Array, " F"], Int[Array, "3 E"] | None]:
        """What `read` reads, and for each split row its number, first part and parts.

        `work` is the tiles of each row's list, `extra` what else its kernel wants to know of it.
        Rows past the split ones have no parts.
        """
        work, others = work.reshape(-1), [x.reshape(-1) for x in extra]
        if not self.extra:
            row, first, last, part, splits = (
                jnp.arange(self.rows),
                0 * work,
                work,
                0 * work - 1,
                None,
            )
        else:
            row, first, last, part, splits = self._cut(work)
            others = [x[jnp.minimum(row, self.rows - 1)] for x in others]
        weight = jnp.where(row < self.rows, last - first, -1)
        long = weight > LONG * weight.mean()
        # Long ones first, whatever their head; then head after head, long before short.
        owner = jnp.minimum(row // self.tiles, self.owners - 1)
        most = weight.max() + 2
        key = jnp.where(long, self.owners, self.owners - 1 - owner) * most + weight
        key = jnp.where(weight < 0, -1, key)
        fields = jnp.where(row < self.rows, row, -1), first, last, part, *others
        columns = [long.sum()[None], *_sorted_by(key, fields)]
        return jnp.concatenate([c.astype(jnp.int32) for c in columns]), splits

    def _cut(self, work):
        share = -(-work.sum() // self.extra)  # so that no more than `extra` parts are added
        parts = jnp.maximum(1, -(-work // jnp.maximum(share, 1)))
        ends = jnp.cumsum(parts)
        here = jnp.arange(self.rows + self.extra)
        row = (ends <= here[:, None]).sum(-1)  # `rows` where there is no item
        own = jnp.minimum(row, self.rows - 1)
        number, length = here - (ends - parts)[own], -(-work // parts)[own]
        first = jnp.minimum(number * length, work[own])
        last = jnp.minimum(first + length, work[own])
        is_split = parts > 1
        part_ends = jnp.cumsum(jnp.where(is_split, parts, 0))
        part = jnp.where(is_split[own], (part_ends - parts)[own] + number, -1)
        nth = jnp.cumsum(is_split)
        which = (nth <= jnp.arange(self.extra)[:, None]).sum(-1)
        there, which = which < self.rows, jnp.minimum(which, self.rows - 1)
        splits = which, (part_ends - parts)[which], jnp.where(there, parts[which], 0)
        return row, first, last, part, jnp.stack(splits).astype(jnp.int32)

    def read(self, block, slot, table, extra: int) -> Item:
        """Item number `slot` of a thread block, from a reference to the table."""
        count, blocks = self.rows + self.extra, self.thread_blocks
        # Folded, so that a thread block gets long and short ones.
        place = jnp.where(slot % 2 == 1, blocks - 1 - block, block) + slot * blocks
        there = (slot < self.size) & (place < self.items)
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

    def each(self, block, table, visit, carry, extra: int = 0):
        """`visit(item, carry)` for the items of a thread block, each read one ahead."""

        def go(slot, state):
            item, carry = state
            return self.read(block, slot + 1, table, extra), visit(item, carry)

        start = self.read(block, jnp.int32(0), table, extra), carry
        return lax.fori_loop(0, self.size, go, start)[1]


def _sorted_by(key: Int[Array, " M"], fields) -> list[Int[Array, " M"]]:
    """Fields in descending order of the key, ties in place.

    Up to 4096 of them by counting who comes before, which is two small kernels and no sort.
    """
    count = key.shape[0]
    if count > 4096:
        order = jnp.argsort(-key, stable=True)
        return [x[order] for x in fields]
    here = jnp.arange(count, dtype=jnp.int32)
    before = (key > key[:, None]) | ((key == key[:, None]) & (here < here[:, None]))
    rank = before.sum(-1, dtype=jnp.int32)
    return [jnp.where(rank == here[:, None], x, 0).sum(-1) for x in fields]
