"""What the kernels read about groups, computed from their sizes: data, in shapes that never change.

Tile copies move whole slabs of rows that begin at multiples of `SLAB`; groups begin where they
like.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsax.pallas.hopper import ROWS, SLAB

DEPTH = 64  # summands of a step: a line of shared memory
# Rows of a group outside of its whole steps: fewer than a slab before them, than a step after.
ENDS = DEPTH + SLAB


def bounds(group_sizes: Int[Array, " G"], rows: int) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """First row and row past the last of every group, cut off at `rows`."""
    ends = jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return jnp.minimum(starts, rows), jnp.minimum(ends, rows)


def most_tiles(rows: int, groups: int) -> int:
    """Row tiles that any sizes may need: a tile more for each group, whose first slab is shared."""
    return (rows + groups * (ROWS + SLAB - 2)) // ROWS


def row_tiles(starts: Int[Array, " G"], ends: Int[Array, " G"], rows: int) -> Int[Array, " F"]:
    """Number of row tiles, then group, first slab, start and end of the group, and place of each.

    A tile belongs to one group. It begins with a whole slab, up to 7 rows before the group. Tiles
    of a group are paired in order; places are 1 and 2 in a pair, 0 of one left over.
    """
    first = starts // SLAB
    tiles = jnp.where(ends > starts, -(-(ends - SLAB * first) // ROWS), 0)
    past = jnp.cumsum(tiles)
    here = jnp.arange(most_tiles(rows, starts.shape[0]), dtype=jnp.int32)
    group = jnp.minimum((past <= here[:, None]).sum(-1), starts.shape[0] - 1)
    of_group = here - (past - tiles)[group]
    slab = first[group] + ROWS // SLAB * of_group
    place = jnp.where(of_group // 2 * 2 + 1 < tiles[group], 1 + of_group % 2, 0)
    fields = past[-1:], group, slab, starts[group], ends[group], place
    return jnp.concatenate([x.astype(jnp.int32) for x in fields])


def shared_rows(starts: Int[Array, " G"], ends: Int[Array, " G"]) -> Int[Array, "G 2 8"]:
    """Rows of each group in its first and last slab, where it shares them; -1 for any other.

    No row is listed twice.
    """
    row = jnp.stack([starts, ends], 1)[..., None] // SLAB * SLAB + jnp.arange(SLAB)
    own = (starts[:, None, None] <= row) & (row < ends[:, None, None])
    in_first = (starts % SLAB != 0)[:, None]
    in_last = (ends % SLAB != 0) & (ends // SLAB * SLAB >= starts)
    listed = own & jnp.stack([in_first, in_last[:, None]], 1)
    return jnp.where(listed, row, -1)


def steps(starts: Int[Array, " G"], ends: Int[Array, " G"]) -> Int[Array, " F"]:
    """First slab of each group's whole steps, number of these, and of all its steps."""
    first, count = _whole_steps(starts, ends)
    rest = ends - starts - DEPTH * count
    return jnp.concatenate([first // SLAB, count, count - (-rest // DEPTH)])


def rows_at_ends(starts: Int[Array, " G"], ends: Int[Array, " G"]) -> Int[Array, "G E"]:
    """Rows of each group outside of its whole steps, then -1."""
    first, count = _whole_steps(starts, ends)
    before = jnp.minimum(first, ends) - starts
    i = jnp.arange(ENDS, dtype=jnp.int32)
    after = (jnp.minimum(first + DEPTH * count, ends) - before)[:, None] + i
    row = jnp.where(i < before[:, None], starts[:, None] + i, after)
    return jnp.where(row < ends[:, None], row, -1)


def _whole_steps(starts, ends):
    first = -(-starts // SLAB) * SLAB
    return first, jnp.maximum(ends - first, 0) // DEPTH
