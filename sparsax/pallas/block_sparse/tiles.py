"""What the kernels walk: lists of row tiles.

A kernel's unit of work is a *row tile*: `ROWS` consecutive rows (queries going forward and for
dQ, keys for dK and dV), and the list of column blocks that any of them needs. Blocks of 128 rows
are tiles already; smaller ones share a tile, which walks the union of their lists and knows by a
bit mask which of its row blocks listed a column (`regroup.py`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsax.pallas.block_sparse.rules import PairRule

ROWS = 128  # two warpgroups of 64 rows, the M of a Hopper matrix instruction


def unusable(count, width: int):
    """Whether a list of so many entries, which can hold so many, is not valid."""
    return (count < 0) | (count > width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Every:
    """All lists of a pattern, asked only whether they are usable: a head is if all of its are.

    Attributes:
        counts: entries of each list by query `[A, I]`, and by key `[A, J]`.
        widths: the most entries that one can hold, of each of these.
    """

    counts: tuple[Int[Array, "A I"], Int[Array, "A J"]]
    widths: tuple[int, int] = dataclasses.field(metadata={"static": True})


class Given(NamedTuple):
    """Which arrays of lists, besides `count` and `cols`, a kernel is built for."""

    full: bool
    bits: bool
    every: tuple[int, int] | None  # widths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TileLists:
    """Column blocks of every row tile of every pattern head, those that need no mask first.

    Attributes:
        full: leading entries in which every pair attends, `[A, R]`: A is P, or P of every sample;
            none where below 0. None: none anywhere.
        count: entries of the list, `[A, R]`; `unusable` where the pattern is not to be used.
        cols: column blocks `[P, R, C]`.
        bits: which row blocks of the tile list the column, `[P, R, C]`; None if it is always all.
        every: what else makes all of a head unusable; None where `count` says it row by row.
    """

    full: Int[Array, "A R"] | None
    count: Int[Array, "A R"]
    cols: Int[Array, "P R C"]
    bits: Int[Array, "P R C"] | None
    every: Every | None = None

    @property
    def given(self) -> Given:
        """Which of them there are."""
        return Given(self.full is not None, self.bits is not None, self.every and self.every.widths)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Which pairs of a row and a column position attend: `-before <= column - row <= after`.

    Attributes:
        rows: number of row positions.
        cols: number of column positions; what is past it must be masked if `mask_tail`.
        before: farthest column before the row's own index; None for no limit.
        after: farthest column after it; None for no limit.
        mask_tail: False where positions past `cols` cannot contribute anyhow.
        ids: rows and columns also carry ids that must be equal, or what `rule` reads.
        rule: what says instead of bits and ids which pairs attend.
    """

    rows: int
    cols: int
    before: int | None
    after: int | None
    mask_tail: bool
    ids: bool
    rule: PairRule | None = None

    def partial(self, block_col: int) -> bool:
        """Whether any pair of blocks may need a mask at all."""
        return self.ids or self._by_position(block_col)

    def by_ids_alone(self, block_col: int) -> bool:
        """Whether all pairs of blocks need a mask, of ids and nothing else."""
        return self.ids and not self._by_position(block_col)

    def _by_position(self, block_col: int) -> bool:
        tail = self.mask_tail and self.cols % block_col != 0
        return tail or self.before is not None or self.after is not None

    def meets(self, row, rows: int, col, cols: int):
        """Whether any pair of so many rows and columns from these on attends, ids aside."""
        last_row, last_col = self._ends(row, rows, col, cols)
        found = col < self.cols
        if self.before is not None:
            found &= last_col - row >= -self.before
        if self.after is not None:
            found &= col - last_row <= self.after
        return found

    def begins(self, row, rows: int, col):
        """Whether no row of these has too many columns after that one to see it from its side."""
        if self.before is None:
            return col >= 0
        last_row, _ = self._ends(row, rows, col, 1)
        return col - last_row >= -self.before

    def whole(self, row, rows: int, col, cols: int):
        """Whether all pairs of rows and columns attend, ids aside."""
        found = self.begins(row, rows, col)
        if self.after is not None:
            found &= self._ends(row, rows, col, cols)[1] - row <= self.after
        if self.mask_tail:
            found &= col + cols <= self.cols
        return found

    def _ends(self, row, rows: int, col, cols: int):
        """The last row and column that there are."""
        return jnp.minimum(row + rows, self.rows) - 1, jnp.minimum(col + cols, self.cols) - 1
