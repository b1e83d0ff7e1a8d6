"""Lists of row blocks regrouped into lists of row tiles, by XLA.

Each step of it is a launch, which takes as long as a short attention kernel: so there are few.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.tiles import ROWS, Bounds, TileLists, unusable

COMPARED = 2**25  # comparisons at most, about as long as the launches that they spare


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
    return _ordered(counts, lists, bounds, block_col)


def _ordered(counts, lists, bounds: Bounds, block_col: int) -> TileLists:
    """Of rows that are tiles. A list ascends: what they see of it whole is one run, others around.

    So its place in the list is known by how many entries are out of sight before it, and how many
    are seen in part.
    """
    slots = jnp.arange(lists.shape[-1])
    rows, cols = ROWS * jnp.arange(counts.shape[-1])[:, None], lists * block_col
    used = slots < counts[..., None]
    seen = used & bounds.meets(rows, ROWS, cols, block_col)
    begun = bounds.begins(rows, ROWS, cols)
    whole = seen & bounds.whole(rows, ROWS, cols, block_col) & (not bounds.ids)
    number = lambda chosen: chosen.sum(-1, keepdims=True, dtype=jnp.int32)
    full, count = number(whole), number(seen)
    if bounds.before is not None:
        early = number(seen & ~begun)
        skipped = number(used & ~seen & ~begun)
        place = slots + skipped
        place += jnp.where(slots < full, early, jnp.where(slots < full + early, -full, 0))
        place = jnp.minimum(place, lists.shape[-1] - 1)
        lists = jnp.take_along_axis(lists, place, -1, mode="promise_in_bounds")
    return _lists(unusable(counts, lists.shape[-1]), full[..., 0], count[..., 0], lists, None)


def _joined(counts, lists, bounds: Bounds, block_row: int, block_col: int) -> TileLists:
    """Of tiles of several row blocks: the columns that any of these lists, in order."""
    (heads, num_rows), width, per_tile = counts.shape, lists.shape[-1], ROWS // block_row
    tiles, num_cols, _ = tile_shape(num_rows, width, bounds, block_row, block_col)
    rows = block_row * jnp.arange(num_rows)[:, None]
    used = jnp.arange(width) < counts[..., None]
    used &= bounds.meets(rows, block_row, lists * block_col, block_col)
    lists = jnp.where(used, lists, num_cols)
    ragged = ((0, 0), (0, tiles * per_tile - num_rows), (0, 0))
    cut = lambda x, fill: jnp.pad(x, ragged[: x.ndim], constant_values=fill).reshape(
        heads, tiles, per_tile, *x.shape[2:]
    )
    columns, shifts = jnp.arange(num_cols), jnp.arange(per_tile)
    few = heads * tiles * num_cols * (per_tile * width + 2 * num_cols) <= COMPARED
    if few:
        named = cut(lists, num_cols)[:, :, None] == columns[:, None, None]  # P R C rows W
        bits = jnp.where(named, 1 << shifts[:, None], 0).sum((-2, -1))
    else:
        p, i = jnp.arange(heads)[:, None, None], jnp.arange(num_rows)[:, None]
        member = jnp.zeros((heads, num_rows, num_cols), bool).at[p, i, lists].set(True, mode="drop")
        bits = (cut(member, False).astype(jnp.int32) << shifts[:, None]).sum(2)
    present = bits > 0
    # A row block past the end lists nothing, yet must not make its tile partial.
    there = (jnp.arange(tiles * per_tile) < num_rows).reshape(tiles, per_tile)
    everyone = jnp.where(there, 1 << shifts, 0).sum(-1)[:, None]
    whole = bounds.whole(ROWS * jnp.arange(tiles)[:, None], ROWS, columns * block_col, block_col)
    full = present & (bits == everyone) & whole & (not bounds.ids)
    kind = jnp.where(full, 0, jnp.where(present, 1, 2))
    if few:
        mine, other = kind[..., None], kind[..., None, :]
        before = (other < mine) | ((other == mine) & (columns < columns[:, None]))
        slot = before.sum(-1)
        chosen = (slot[..., None, :] == columns[:, None]) & present[..., None, :]
        place = lambda x: jnp.where(chosen, x[..., None, :], 0).sum(-1)
    else:
        at_front = jnp.cumsum(full, -1)
        slot = jnp.where(full, at_front, at_front[..., -1:] + jnp.cumsum(present, -1) - at_front)
        slot = jnp.where(present, slot - 1, num_cols)
        index = jnp.arange(heads)[:, None, None], jnp.arange(tiles)[:, None], slot
        place = lambda x: jnp.zeros_like(bits).at[index].set(x, mode="drop")
    return _lists(
        cut(unusable(counts, width), False).any(2), full.sum(-1), present.sum(-1),
        place(jnp.broadcast_to(columns, bits.shape)), place(bits),
    )  # fmt: skip


def _lists(invalid, full, count, cols, bits) -> TileLists:
    return TileLists(jnp.where(invalid, 0, full), jnp.where(invalid, INVALID, count), cols, bits)
