"""What the kernels walk: block lists regrouped into row tiles.

A kernel's unit of work is a *row tile*: `ROWS` consecutive rows (queries going forward and for
dQ, keys for dK and dV), and the list of column blocks that any of them needs. Blocks of 128 rows
are tiles already; smaller ones share a tile, which walks the union of their lists and knows by a
bit mask which of its row blocks listed a column.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.rules import PairRule

ROWS = 128  # two warpgroups of 64 rows, the M of a Hopper matrix instruction


def unusable(count, width: int):
    """Whether a list of so many entries, which can hold so many, is not valid."""
    return (count < 0) | (count > width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Turned:
    """The same heads' lists by column, asked only whether they are valid.

    Attributes:
        count: entries of each, `[A, J]`.
        widths: the most entries that a list by row, and one by column, can hold.
    """

    count: Int[Array, "A J"]
    widths: tuple[int, int] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TileLists:
    """Column blocks of every row tile of every pattern head, those that need no mask first.

    Attributes:
        full: leading entries in which every pair attends, `[A, R]`: A is P, or P of every sample;
            none where below 0.
        count: entries of the list, `[A, R]`; `unusable` where the pattern is not to be used.
        cols: column blocks `[P, R, C]`.
        bits: which row blocks of the tile list the column, `[P, R, C]`; None if it is always all.
        turned: what else makes all of a head unusable; None where `count` says it row by row.
    """

    full: Int[Array, "A R"]
    count: Int[Array, "A R"]
    cols: Int[Array, "P R C"]
    bits: Int[Array, "P R C"] | None
    turned: Turned | None = None


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
        tail = self.mask_tail and self.cols % block_col != 0
        return self.ids or tail or self.before is not None or self.after is not None


def tile_lists(
    counts: Int[Array, "P I"],
    lists: Int[Array, "P I W"],
    bounds: Bounds,
    block_row: int,
    block_col: int,
) -> TileLists:
    """Regroups the lists of row blocks into lists of row tiles.

    Costs nothing where row blocks are tiles and no pair needs a mask; else a few scans over a
    `[P, R, J]` array, J being the number of column blocks.
    """
    per_tile = ROWS // block_row
    if per_tile == 1 and not bounds.partial(block_col):
        return TileLists(counts, counts, lists, None)

    (heads, num_rows), num_cols = counts.shape, -(-bounds.cols // block_col)
    tiles = -(-num_rows // per_tile)
    used = jnp.arange(lists.shape[-1]) < counts[..., None]
    p, i = jnp.arange(heads)[:, None, None], jnp.arange(num_rows)[:, None]
    member = jnp.zeros((heads, num_rows, num_cols), bool)
    member = member.at[p, i, jnp.where(used, lists, num_cols)].set(True, mode="drop")
    ragged = ((0, 0), (0, tiles * per_tile - num_rows), (0, 0))
    cut = lambda x, fill: jnp.pad(x, ragged[: x.ndim], constant_values=fill).reshape(
        heads, tiles, per_tile, *x.shape[2:]
    )
    # A row block past the end lists nothing, yet must not make its tile partial.
    present, all_rows = cut(member, False).any(2), cut(member, True).all(2)
    shifts = jnp.arange(per_tile)[:, None]
    bits = (cut(member, False).astype(jnp.int32) << shifts).sum(2)

    slot = jnp.cumsum(present, -1) - 1
    full = present & False
    if not bounds.ids:
        full = present & all_rows & _whole(bounds, tiles, num_cols, block_col)
        at_front = jnp.cumsum(full, -1)
        slot = jnp.where(full, at_front - 1, at_front[..., -1:] + slot - at_front)
    slot = jnp.where(present, slot, num_cols)
    index = p, jnp.arange(tiles)[:, None], slot
    place = lambda x: jnp.zeros_like(bits).at[index].set(x, mode="drop")
    invalid = cut(unusable(counts, lists.shape[-1]), False).any(2)
    return TileLists(
        jnp.where(invalid, 0, full.sum(-1)),
        jnp.where(invalid, INVALID, present.sum(-1)),
        place(jnp.arange(num_cols)),
        place(bits) if per_tile > 1 else None,
    )


def _whole(bounds: Bounds, tiles: int, num_cols: int, block_col: int):
    """`[R, C]`: True where all pairs of a row tile and a column block attend."""
    first_row = ROWS * jnp.arange(tiles)[:, None]
    last_row = jnp.minimum(first_row + ROWS, bounds.rows) - 1
    first_col = block_col * jnp.arange(num_cols)
    last_col = jnp.minimum(first_col + block_col, bounds.cols) - 1
    whole = jnp.ones((tiles, num_cols), bool)
    if bounds.before is not None:
        whole &= first_col - last_row >= -bounds.before
    if bounds.after is not None:
        whole &= last_col - first_row <= bounds.after
    if bounds.mask_tail:
        whole &= first_col + block_col <= bounds.cols
    return whole
