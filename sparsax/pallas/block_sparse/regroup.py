"""Lists of row blocks regrouped into lists of row tiles, by XLA.

Each step of it is a launch, which takes as long as a short attention kernel: so there are few.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.tiles import ROWS, Bounds, TileLists, unusable

COMPARED = 2**25  # comparisons at most, about as long as the launches that they spare
BROKEN = 1 << 8  # more than bits of row blocks


def tile_shape(
    rows: int, width: int, bounds: Bounds, block_row: int, block_col: int
) -> tuple[int, int, bool]:
    """Row tiles of so many lists, the most entries of each, and whether it needs bits."""
    per_tile = ROWS // block_row
    columns = -(-bounds.cols // block_col)
    return -(-rows // per_tile), width if per_tile == 1 else columns, per_tile > 1


def tile_lists(
    counts: Int[Array, "P I"],
    lists: Int[Array, "P I W"],
    bounds: Bounds,
    block_row: int,
    block_col: int,
) -> TileLists:
    """Regroups the lists of row blocks into lists of row tiles, without what nobody may see.

    Costs nothing where row blocks are tiles and no pair needs a mask.
    """
    if block_row < ROWS:
        return _joined(counts, lists, bounds, block_row, block_col)
    if not bounds.partial(block_col):
        return TileLists(counts, counts, lists, None)
    if bounds.by_ids_alone(block_col):
        return TileLists(None, counts, lists, None)
    return _ordered(counts, lists, bounds, block_col)


def _ordered(counts, lists, bounds: Bounds, block_col: int) -> TileLists:
    """Of rows that are tiles. A list ascends: what they see of it whole is one run, others around.

    So its place in the list is known by how many entries are out of sight before it, and how many
    are seen in part.
    """
    slots, width = jnp.arange(lists.shape[-1]), lists.shape[-1]
    rows, cols = ROWS * np.arange(counts.shape[-1])[:, None], lists * block_col
    broken = unusable(counts, width)[..., None]
    used = (slots < counts[..., None]) & ~broken
    seen = used & bounds.meets(rows, ROWS, cols, block_col)
    begun = bounds.begins(rows, ROWS, cols)
    whole = seen & bounds.whole(rows, ROWS, cols, block_col) & (not bounds.ids)
    full, count = _sum(whole), _sum(jnp.where(broken & (slots == 0), INVALID, seen))
    if bounds.before is not None:
        of_whole, early = full[..., None], _sum(seen & ~begun)[..., None]
        place = slots + _sum(used & ~seen & ~begun)[..., None]
        place += jnp.where(
            slots < of_whole, early, jnp.where(slots < of_whole + early, -of_whole, 0)
        )
        place = jnp.minimum(place, width - 1)
        lists = jnp.take_along_axis(lists, place, -1, mode="promise_in_bounds")
    return TileLists(full, count, lists, None)


def _joined(counts, lists, bounds: Bounds, block_row: int, block_col: int) -> TileLists:
    """Of tiles of several row blocks: the columns that any of these lists, in order."""
    (heads, num_rows), width, per_tile = counts.shape, lists.shape[-1], ROWS // block_row
    tiles, num_cols, _ = tile_shape(num_rows, width, bounds, block_row, block_col)
    few = heads * tiles * num_cols * (per_tile * width + 2 * num_cols) <= COMPARED
    find, order = (_compared_bits, _compared) if few else (_scattered_bits, _scattered)

    rows = block_row * np.arange(num_rows)[:, None]
    used = jnp.arange(width) < counts[..., None]
    used &= bounds.meets(rows, block_row, lists * block_col, block_col)
    lists = jnp.where(used, lists, num_cols)  # none of the columns
    of_tiles = lambda x, fill: _grouped(x, per_tile, fill)
    marks = find(of_tiles(unusable(counts, width), False), of_tiles(lists, num_cols), num_cols)
    broken, bits, columns = marks >= BROKEN, marks % BROKEN, np.arange(num_cols, dtype=np.int32)
    present = (bits > 0) & ~broken
    # A row block past the end lists nothing, yet must not make its tile partial.
    there = (np.arange(tiles * per_tile) < num_rows).reshape(tiles, per_tile)
    everyone = (there << np.arange(per_tile)).sum(-1)[:, None]
    whole = bounds.whole(ROWS * np.arange(tiles)[:, None], ROWS, columns * block_col, block_col)
    full = present & (bits == everyone) & whole & (not bounds.ids)
    count = jnp.where(broken & (columns == 0), INVALID, present)
    return TileLists(_sum(full), _sum(count), *order(full, present, columns, bits))


def _sum(x):
    return x.sum(-1, dtype=jnp.int32)


def _grouped(x, per_tile: int, fill):
    """What belongs to row blocks `[P, I, ...]` by row tile, `[P, R, per tile, ...]`."""
    widths = (0, 0), (0, -x.shape[1] % per_tile), *((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(len(x), -1, per_tile, *x.shape[2:])


# Which row blocks list a column, as bits `[P, R, C]`, `BROKEN` where a list is not usable; and the
# columns and their bits, whole ones first: by comparing all with all, and by scatters and scans.


def _compared_bits(broken, lists, num_cols: int):
    rows = jnp.arange(lists.shape[2])[:, None]
    named = lists[:, :, None] == jnp.arange(num_cols)[:, None, None]  # P R C rows W
    first = jnp.arange(lists.shape[-1]) == 0
    marks = jnp.where(named, jnp.int32(1) << rows, 0)
    marks |= jnp.where(broken[:, :, None, :, None] & first, BROKEN, 0)
    return jnp.bitwise_or.reduce(marks.reshape(*marks.shape[:3], -1), axis=-1)


def _scattered_bits(broken, lists, num_cols: int):
    heads, tiles, rows = (np.arange(size) for size in lists.shape[:3])
    p, r, i = (x[..., None] for x in np.ix_(heads, tiles, rows))
    member = jnp.zeros((*lists.shape[:3], num_cols), bool).at[p, r, i, lists].set(True, mode="drop")
    bits = (member.astype(jnp.int32) << jnp.arange(lists.shape[2])[:, None]).sum(2, dtype=jnp.int32)
    return bits + jnp.where(broken.any(2), BROKEN, 0)[..., None]


def _compared(full, present, columns, bits):
    kind = jnp.where(full, 0, jnp.where(present, 1, 2))
    mine, other = kind[..., None], kind[..., None, :]
    slot = _sum((other < mine) | ((other == mine) & (columns < columns[:, None])))
    chosen = (slot[..., None, :] == columns[:, None]) & present[..., None, :]
    place = lambda x: _sum(jnp.where(chosen, x, 0))
    return place(columns), place(bits[..., None, :])


def _scattered(full, present, columns, bits):
    at_front = jnp.cumsum(full, -1)
    slot = jnp.where(full, at_front, at_front[..., -1:] + jnp.cumsum(present, -1) - at_front)
    slot = jnp.where(present, slot - 1, len(columns))
    heads, tiles = bits.shape[:2]
    index = jnp.arange(heads)[:, None, None], jnp.arange(tiles)[:, None], slot
    place = lambda x: jnp.zeros_like(bits).at[index].set(x, mode="drop")
    return place(columns), place(bits)
