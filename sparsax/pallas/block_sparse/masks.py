"""Which pairs of a tile attend, from positions, list bits and ids. Rows are a warpgroup's 64."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import Columns
from sparsax.pallas.block_sparse.tiles import Bounds
from sparsax.pallas.hopper import MATRIX, ROW, WG_ROWS, per_col, per_row

NOWHERE = 1 << 30  # the position of a piece that no row may see


def pieces(columns: Columns, cols_ref, bits_ref, index, count, tile, row_in_tile, block_row):
    """First column and row bits of each piece of a tile; read before waiting for its data.

    `index` selects the row tile's list. `row_in_tile` is the warpgroup's first row in it.
    """
    starts, words = [], []
    if columns.ids_say_all:
        return starts, words
    for piece in range(columns.gather):
        entry = columns.entry(tile, piece)
        there = entry < count
        entry = jnp.minimum(entry, jnp.maximum(count - 1, 0))
        start = columns.position(cols_ref[(*index, entry)], tile)
        word = jnp.int32(-1)
        if bits_ref is not None:
            word = lax.shift_right_logical(
                bits_ref[(*index, entry)], jnp.int32(row_in_tile // block_row)
            )
            # One bit speaks for all rows of the warpgroup, unless a rule asks for it.
            if block_row >= WG_ROWS and columns.bounds.rule is None:
                there &= (word & 1) == 1
        starts.append(jnp.where(there, start, NOWHERE))
        words.append(word)
    return starts, words


def keep(
    values, fill: float, columns: Columns, found, first_row, block_row: int,
    ids: tuple[Any, Any] | None, is_global,
):  # fmt: skip
    """Values `[64, tile]` of a warpgroup's rows and a tile's columns; `fill` where no pair attends.

    `is_global` is a scalar of the kernel, whether the tile is one of global rows; or the position
    from which on the columns of a tile are; None without any.
    """
    shape, ids_of_pairs = values.shape, ids or ()
    rule: Any = columns.bounds.rule
    ordinary = lambda: kept(columns, found, first_row, block_row, ids)

    def of_global_rows():
        seen = rule.seen_by_global_rows(*ids_of_pairs, shape)
        if columns.ids_say_all:
            return seen
        return seen & (_cols(columns, found[0], shape)[1] < columns.bounds.cols)

    where = lambda attend: lambda x: jnp.where(attend(), x, fill)
    if is_global is None:
        return where(ordinary)(values)
    if isinstance(is_global, int):
        later = _cols(columns, found[0], shape)[1] >= is_global
        return jnp.where(later, where(of_global_rows)(values), where(ordinary)(values))
    return lax.cond(is_global, where(of_global_rows), where(ordinary), values)


def kept(columns: Columns, found, first_row, block_row: int, ids: tuple[Any, Any] | None):
    """Boolean `[64, tile]`: the pairs that attend, but for those of global rows.

    `ids` are of rows and of columns, a tuple of vectors each, or None.
    """
    shape, bounds, ids_of_pairs = (WG_ROWS, columns.tile), columns.bounds, ids or ()
    rule: Any = bounds.rule
    if columns.ids_say_all:
        return rule.keep(*ids_of_pairs, None, shape)
    starts, words = found
    lane, col = _cols(columns, starts, shape)
    attend = _within(bounds, col, first_row)
    listed = None
    if block_row < WG_ROWS or (rule is not None and rule.blocks):
        word = _select(lane, words, columns.width)
        if block_row < WG_ROWS:
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            word = lax.shift_right_logical(word, row // block_row)
        listed = (word & 1) == 1
    if rule is not None and ids is not None:
        return attend & rule.keep(*ids_of_pairs, listed, shape)
    attend = attend if listed is None else attend & listed
    if ids is not None:
        (rows,), (cols,) = ids
        attend &= per_row(rows, shape) == per_col(cols, shape)
    return attend


def _cols(columns: Columns, starts, shape):
    """Where in the tile each column stands, and its position."""
    lane = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    col = lane + starts[0]
    for piece in range(1, columns.gather):
        begin = piece * columns.width
        col = jnp.where(lane < begin, col, lane + (starts[piece] - begin))
    return lane, col


def _within(bounds: Bounds, col, first_row):
    """Whether columns exist and lie within a row's bounds.

    Of a row's first and last column one comparison makes both: the distance to the first goes round
    in numbers of 32 bits, moved by half of them because they have signs.
    """
    if bounds.before is None and bounds.after is None:
        return col < bounds.cols
    row = first_row + plgpu.broadcasted_iota(jnp.int32, (WG_ROWS,), 0, layout=ROW)
    last = jnp.full_like(row, bounds.cols - 1)
    if bounds.after is not None:
        last = jnp.minimum(last, row + bounds.after)
    if bounds.before is None:
        return col <= per_row(last, col.shape)
    first = jnp.maximum(row - bounds.before, 0)
    none = last < first
    first, length = jnp.where(none, -1, first), jnp.where(none, 0, last - first)
    half = lambda x: x + jnp.int32(-(2**31))
    return col - per_row(half(first), col.shape) <= per_row(half(length), col.shape)


def _select(lane, values, width):
    chosen = jnp.zeros_like(lane) + values[0]
    for piece in range(1, len(values)):
        chosen = jnp.where(lane < piece * width, chosen, values[piece])
    return chosen
