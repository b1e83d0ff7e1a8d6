"""The lists of a compound pattern: what the row tiles of queries and of keys walk.

Bands are static, so without blocks the lists are constants, and only how many of their entries a
sample uses is computed: packed columns stand last. Blocks are data, and then so are the lists.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsax.compound import CompoundPattern
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS, TileLists
from sparsax.pallas.compound.keys import Keys, joined, mark_invalid


class _Cover(NamedTuple):
    """What bands and blocks hold of row tiles and column blocks, `[1 or P, R, C]`."""

    present: Any  # some pair
    whole: Any  # all pairs
    bits: Any  # listed row blocks; None without blocks


def query_lists(keys: Keys) -> TileLists:
    """Row tiles of queries over blocks of keys, then of packed keys; and of global rows."""
    x, pattern = keys.problem, keys.pattern
    packed = x.packed // x.block_kv
    cover = _cover(x, pattern, keys_in_rows=False)
    lists = _ordered(cover, packed, x.packed_from // x.block_kv if packed else 0)
    rows = lists.cols.shape[1]
    seen = -(-jnp.maximum(pattern.num_columns, 0)[:, None] // x.block_kv)  # blocks in use
    if pattern.causal:  # and packed keys ascend
        first = np.arange(packed) * x.block_kv
        last_row = np.arange(rows)[:, None] * ROWS + ROWS - 1
        seen = jnp.minimum(seen, (keys.slots[:, None, first] <= last_row).sum(-1))
    full = lists.full[None]  # samples, P, R
    if (special := _special(keys)) is not None:
        clean = ~_some(special, x.block_kv).at[:, lists.cols].get(mode="fill", fill_value=False)
        full = jnp.minimum(full, jnp.cumprod(clean, -1).sum(-1))
    count = lists.count[None] + seen[:, None]
    if pattern.token_mask is not None:
        count = jnp.where(_some(pattern.token_mask, ROWS)[:, None], count, 0)
    found = full, count, lists.cols, lists.bits
    return _per_sample(keys, *(_below(keys, found, *_global_rows(keys)) if x.rows else found))


def _global_rows(keys: Keys):
    """The lists of row tiles of global rows: all blocks of the keys that they see."""
    x, pattern = keys.problem, keys.pattern
    blocks = -(-x.S // x.block_kv)
    whole, count = np.arange(1, blocks + 1) * x.block_kv <= x.S, jnp.full((1, 1), blocks)
    if pattern.token_mask is not None:
        whole = whole & ~_some(~pattern.token_mask, x.block_kv)
        some = _some(pattern.token_mask, x.block_kv)
        count = jnp.where(some, np.arange(blocks) + 1, 0).max(-1, keepdims=True)
    whole = jnp.atleast_2d(jnp.asarray(whole & (not pattern.causal)))
    full = jnp.minimum(jnp.cumprod(whole, -1).sum(-1, keepdims=True), count)
    first = np.arange(0, x.rows, ROWS)
    count = jnp.where(first < pattern.num_rows[:, None], count, 0)
    cols = x.rows_see_from // x.block_kv + np.arange(blocks)
    return full, count, np.broadcast_to(cols, (len(first), blocks))


def key_lists(keys: Keys) -> TileLists:
    """Row tiles of keys over blocks of queries, then of global rows; and of other keys."""
    x, pattern = keys.problem, keys.pattern
    asked = 0 if x.own else x.rows // x.block_q
    cover = _cover(x, pattern, keys_in_rows=True)
    lists = _ordered(cover, asked, x.rows_from // x.block_q)
    full, count = lists.full[None], lists.count[None]  # samples, P, R
    if (special := _special(keys)) is not None:
        full = jnp.where(_some(special, ROWS)[:, None], 0, full)
    if asked:
        count = count + _blocks_of_rows(keys)[:, None]
    if pattern.token_mask is not None:
        count = jnp.where(_some(pattern.token_mask, ROWS)[:, None], count, 0)
    found = full, count, lists.cols, lists.bits
    if x.packed:
        found = _below(keys, found, *_packed_keys(keys))
    if x.own:
        found = _below(keys, found, *_own_keys(keys))
    return _per_sample(keys, *found)


def _packed_keys(keys: Keys):
    """The lists of row tiles of packed keys, which all queries see."""
    x = keys.problem
    blocks, first = -(-x.T // x.block_q), np.arange(0, x.packed, ROWS)
    seen = jnp.full((x.samples, len(first)), blocks)
    if keys.pattern.causal:
        seen = blocks - keys.slots[:, first] // x.block_q
    seen = jnp.where(first < keys.pattern.num_columns[:, None], seen, 0)
    # From the last block down, so that causality cuts the end of a list off.
    return 0, seen, np.broadcast_to(np.arange(blocks)[::-1], (len(first), blocks))


def _own_keys(keys: Keys):
    """The lists of row tiles of the keys that global rows alone see."""
    x, pattern = keys.problem, keys.pattern
    tiles, blocks = -(-x.S // ROWS), x.rows // x.block_q
    count = jnp.broadcast_to(_blocks_of_rows(keys), (x.samples, tiles))
    full = 0 * count if pattern.causal else count
    if pattern.token_mask is not None:
        full = jnp.where(_some(~pattern.token_mask, ROWS), 0, full)
        count = jnp.where(_some(pattern.token_mask, ROWS), count, 0)
    cols = x.rows_from // x.block_q + np.arange(blocks)
    return full, count, np.broadcast_to(cols, (tiles, blocks))


def _blocks_of_rows(keys: Keys):
    """Blocks of global rows in use `[samples, 1]`."""
    return -(-jnp.maximum(keys.pattern.num_rows, 0)[:, None] // keys.problem.block_q)


def _below(keys: Keys, upper, full, count, cols):
    """Lists `(full, count, cols, bits)` with other row tiles behind theirs, of all heads alike."""
    x, (upper_full, upper_count, upper_cols, bits) = keys.problem, upper
    (heads, rows, width), (more, wider) = upper_cols.shape, cols.shape
    grow = lambda y: jnp.pad(y, ((0, 0), (0, more), (0, max(0, wider - width))))
    of_heads = lambda z: (
        jnp.broadcast_to(z, (len(z), more))[:, None] if jnp.ndim(z) else z  # of all heads, tiles
    )
    join = lambda y, z: jnp.broadcast_to(
        joined([(y, rows), (of_heads(z), more)]), (x.samples, heads, rows + more)
    )
    found = join(upper_full, full), join(upper_count, count)
    bits = None if bits is None else grow(bits)
    return *found, grow(upper_cols).at[:, rows:, :wider].set(cols), bits


def _per_sample(keys: Keys, full, count, cols, bits) -> TileLists:
    x = keys.problem
    count = mark_invalid(keys.pattern, count)
    flat = lambda y: jnp.broadcast_to(y, (x.samples, x.P, y.shape[-1])).reshape(x.owners, -1)
    int32 = lambda y: jnp.asarray(y, jnp.int32)
    bits = None if bits is None else int32(bits)
    return TileLists(int32(flat(full)), int32(flat(count)), int32(cols), bits)


def _special(keys: Keys):
    """Keys `[samples, T]` that keep a tile from being whole; None where there are none."""
    x, pattern = keys.problem, keys.pattern
    found = []
    if pattern.token_mask is not None:
        found.append(~pattern.token_mask)
    if pattern.blocks is not None and x.packed:
        found.append(pattern.is_column())  # their pairs in blocks are those of the packed keys
    return sum(found[1:], found[0]) if found else None


def _some(chosen, size: int):
    """Whether any of each `size` tokens is chosen, `[samples, ...]`."""
    chosen = jnp.pad(chosen, ((0, 0), (0, -chosen.shape[-1] % size)))
    return chosen.reshape(len(chosen), -1, size).any(-1)


def _ordered(cover: _Cover, packed: int = 0, packed_from: int = 0) -> TileLists:
    """Whole blocks first, then others, then all packed ones, which the counts leave out."""
    xp = np if isinstance(cover.present, np.ndarray) else jnp
    heads, rows, blocks = cover.present.shape
    rank = xp.where(cover.whole, 0, xp.where(cover.present, 1, 3))
    rank = xp.concatenate([rank, xp.full((heads, rows, packed), 2)], -1)
    width = rank.shape[-1] if xp is jnp else max(1, int((rank < 3).sum(-1).max()))
    order = xp.argsort(rank, axis=-1, stable=True)[..., :width]
    bits = cover.bits
    if bits is not None:
        bits = jnp.take_along_axis(jnp.pad(bits, ((0, 0), (0, 0), (0, packed))), order, -1)
    cols = xp.where(order < blocks, order, order - blocks + packed_from)
    full, count, cols = (
        jnp.asarray(y, jnp.int32) for y in ((rank == 0).sum(-1), (rank < 2).sum(-1), cols)
    )
    return TileLists(full, count, cols, bits)


def _cover(x: Problem, pattern: CompoundPattern, keys_in_rows: bool) -> _Cover:
    block_row, block_col = (x.block_kv, x.block_q) if keys_in_rows else (x.block_q, x.block_kv)
    first_row = np.arange(0, x.T, ROWS)[:, None]
    first_col = np.arange(0, x.T, block_col)
    low = first_col - np.minimum(first_row + ROWS, x.T) + 1  # least column - row of a tile
    high = np.minimum(first_col + block_col, x.T) - 1 - first_row
    # A key that no query sees must be masked; a query past the end has probability 0 anyhow.
    complete = keys_in_rows | (first_col + block_col <= x.T)
    present = whole = np.zeros(low.shape, bool)
    for band in pattern.bands:
        before, after = (band.right, band.left) if keys_in_rows else (band.left, band.right)
        present = present | ((high >= -before) & (low <= after))
        whole = whole | ((low >= -before) & (high <= after) & complete)
    if pattern.blocks is None:
        return _Cover(present[None], whole[None], None)

    mask = pattern.blocks.to_block_mask()
    mask = mask.swapaxes(1, 2) if keys_in_rows else mask
    (heads, num_rows, num_cols), tiles = mask.shape, len(first_row)
    ragged = (0, 0), (0, tiles * (ROWS // block_row) - num_rows), (0, 0)
    cut = lambda fill: jnp.pad(mask, ragged, constant_values=fill).reshape(
        heads, tiles, ROWS // block_row, num_cols
    )
    some, every = np.ones(low.shape, bool), complete
    if pattern.causal:
        some, every = (high >= 0, low >= 0) if keys_in_rows else (low <= 0, high <= 0)
        every &= complete
    shifts = jnp.arange(ROWS // block_row)[:, None]
    return _Cover(
        present | (cut(False).any(2) & some),
        whole | (cut(True).all(2) & every),
        (cut(False).astype(jnp.int32) << shifts).sum(2),
    )
