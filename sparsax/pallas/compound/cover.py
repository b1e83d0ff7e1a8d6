"""Which column blocks the bands and blocks of a pattern hold, row tile by row tile."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsax.compound import CompoundPattern
from sparsax.layouts import BlockPattern
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.schedule import Expected, units
from sparsax.pallas.block_sparse.tiles import ROWS

SHORT = 16  # entries of lists that are compared with every block


class Cover(NamedTuple):
    """What bands and blocks hold of row tiles and column blocks, `[1 or P, R, C]`."""

    present: Any  # some pair
    whole: Any  # all pairs
    bits: Any  # listed row blocks; None without blocks


def cover(x: Problem, pattern: CompoundPattern, keys_in_rows: bool) -> Cover:
    """The cover by queries, or by keys; NumPy's without blocks, which are data."""
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
        return Cover(present[None], whole[None], None)

    mask = _block_mask(pattern.blocks)
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
    return Cover(
        present | (cut(False).any(2) & some),
        whole | (cut(True).all(2) & every),
        (cut(False).astype(jnp.int32) << shifts).sum(2),
    )


def _of_rows(x: Problem, of_bands, keys_in_rows: bool) -> tuple[int, ...]:
    """Units of work of each row tile: of the sequence, and of what is packed behind it."""
    tiles = lambda length: -(-length // ROWS)
    if keys_in_rows:  # global rows see keys of the sequence, unless they have their own
        theirs = tiles(x.rows)
        behind = tiles(x.packed) * [tiles(x.T)] + (tiles(x.S) * [theirs] if x.own else [])
        more = 0 if x.own else theirs
    else:
        behind, more = tiles(x.rows) * [tiles(x.S)], tiles(x.packed)
    return *(int(each) + more for each in of_bands), *behind


def _block_mask(blocks: BlockPattern):
    """`blocks.to_block_mask()`; of short lists without a scatter, which costs more kernels."""
    counts, lists = blocks.kv_num_blocks, blocks.kv_indices
    if lists.shape[-1] > SHORT:
        return blocks.to_block_mask()
    lists = jnp.where(jnp.arange(lists.shape[-1]) < counts[..., None], lists, -1)
    return (lists[..., None, :] == jnp.arange(blocks.num_kv_blocks)[:, None]).any(-1)


def expected_work(x: Problem, pattern: CompoundPattern, keys_in_rows: bool) -> Expected:
    """Units of work in a head's lists of bands and blocks, as far as no data says.

    As if nothing were padding, and every list of blocks as long as its capacity. Of patterns of
    bands, columns and rows the work of each row tile is known, unless padding leaves some nothing:
    at most, where causal or with columns and rows to spare.
    """
    blocks = pattern.blocks
    bands = cover(x, dataclasses.replace(pattern, blocks=None), keys_in_rows).present[0]
    of_bands = units(bands.sum(-1), x.block_q if keys_in_rows else x.block_kv)
    total = int(of_bands.sum())
    if blocks is None:
        known = pattern.token_mask is None
        return Expected(total, _of_rows(x, of_bands, keys_in_rows) if known else ())

    def full(indices, block_row: int, block_col: int) -> int:
        entries = min(-(-x.T // block_col), ROWS // block_row * indices.shape[-1])
        return -(-x.T // ROWS) * units(entries, block_col)

    # Both say which pairs there are, and the one with the lower capacity says it better.
    sizes = x.block_q, x.block_kv
    of_blocks = min(full(blocks.kv_indices, *sizes), full(blocks.q_indices, *sizes[::-1]))
    return Expected(total + (of_blocks // 2 if pattern.causal else of_blocks))
