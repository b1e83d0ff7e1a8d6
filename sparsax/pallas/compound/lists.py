"""The lists of a compound pattern: what the row tiles of queries and of keys walk.

Bands are static, so without blocks the lists are constants, and only how many of their entries a
sample uses is computed: packed columns stand last. Blocks are data, and then so are the lists.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsax.pallas.block_sparse.tiles import ROWS, TileLists
from sparsax.pallas.compound.cover import Cover, cover
from sparsax.pallas.compound.keys import Keys, joined, mark_invalid


class _Lists(NamedTuple):
    """Lists in the making, of all samples and pattern heads; NumPy's where they are constants.

    XLA computes what is not: each array of a program costs a kernel or more, small as it is.
    """

    full: Any  # `[1 or samples, 1 or P, 1 or R]`, as `count`
    count: Any
    cols: Any  # `[1 or P, R, entries]`, as `bits`
    bits: Any = None


def query_lists(keys: Keys) -> TileLists:
    """Row tiles of queries over blocks of keys, then of packed keys; and of global rows."""
    x, pattern = keys.problem, keys.pattern
    packed = x.packed // x.block_kv
    held = cover(x, pattern, keys_in_rows=False)
    lists = _ordered(held, packed, x.packed_from // x.block_kv if packed else 0)
    rows = lists.cols.shape[1]
    seen = -(-jnp.maximum(pattern.num_columns, 0)[:, None] // x.block_kv)  # blocks in use
    if pattern.causal:  # and packed keys ascend
        first = np.arange(packed) * x.block_kv
        last_row = np.arange(rows)[:, None] * ROWS + ROWS - 1
        seen = jnp.minimum(seen, (keys.slots[:, None, first] <= last_row).sum(-1))
    full = lists.full
    if (special := _special(keys)) is not None:
        clean = ~_some(special, x.block_kv).at[:, lists.cols].get(mode="fill", fill_value=False)
        full = jnp.minimum(full, jnp.cumprod(clean, -1).sum(-1))
    count = lists.count + seen[:, None]
    if pattern.token_mask is not None:
        count = jnp.where(_some(pattern.token_mask, ROWS)[:, None], count, 0)
    found = _Lists(full, count, lists.cols, lists.bits)
    return _per_sample(keys, _below(keys, found, _global_rows(keys)) if x.rows else found)


def _global_rows(keys: Keys) -> _Lists:
    """The lists of row tiles of global rows: all blocks of the keys that they see."""
    x, pattern = keys.problem, keys.pattern
    blocks = -(-x.S // x.block_kv)
    whole, count = np.arange(1, blocks + 1) * x.block_kv <= x.S, np.full((1, 1), blocks)
    if pattern.token_mask is not None:
        whole = whole & ~_some(~pattern.token_mask, x.block_kv)
        some = _some(pattern.token_mask, x.block_kv)
        count = jnp.where(some, np.arange(blocks) + 1, 0).max(-1, keepdims=True)
    xp = _xp(whole)
    whole = xp.atleast_2d(whole & (not pattern.causal))
    full = xp.minimum(xp.cumprod(whole, -1).sum(-1, keepdims=True), count)
    first = np.arange(0, x.rows, ROWS)
    count = jnp.where(first < pattern.num_rows[:, None], count, 0)
    cols = x.rows_see_from // x.block_kv + np.arange(blocks)
    return _Lists(full[:, None], count[:, None], np.broadcast_to(cols, (1, len(first), blocks)))


def key_lists(keys: Keys) -> TileLists:
    """Row tiles of keys over blocks of queries, then of global rows; and of other keys."""
    x, pattern = keys.problem, keys.pattern
    asked = 0 if x.own else x.rows // x.block_q
    held = cover(x, pattern, keys_in_rows=True)
    lists = _ordered(held, asked, x.rows_from // x.block_q)
    full, count = lists.full, lists.count
    if (special := _special(keys)) is not None:
        full = jnp.where(_some(special, ROWS)[:, None], 0, full)
    if asked:
        count = count + _blocks_of_rows(keys)[:, None]
    if pattern.token_mask is not None:
        count = jnp.where(_some(pattern.token_mask, ROWS)[:, None], count, 0)
    found = _Lists(full, count, lists.cols, lists.bits)
    if x.packed:
        found = _below(keys, found, _packed_keys(keys))
    if x.own:
        found = _below(keys, found, _own_keys(keys))
    return _per_sample(keys, found)


def _packed_keys(keys: Keys) -> _Lists:
    """The lists of row tiles of packed keys, which all queries see."""
    x = keys.problem
    blocks, first = -(-x.T // x.block_q), np.arange(0, x.packed, ROWS)
    seen = blocks - keys.slots[:, first] // x.block_q if keys.pattern.causal else blocks
    seen = jnp.where(first < keys.pattern.num_columns[:, None], seen, 0)[:, None]
    # From the last block down, so that causality cuts the end of a list off.
    cols = np.broadcast_to(np.arange(blocks)[::-1], (1, len(first), blocks))
    return _Lists(np.zeros((1, 1, 1), int), seen, cols)


def _own_keys(keys: Keys) -> _Lists:
    """The lists of row tiles of the keys that global rows alone see."""
    x, pattern = keys.problem, keys.pattern
    tiles, blocks = -(-x.S // ROWS), x.rows // x.block_q
    count = jnp.broadcast_to(_blocks_of_rows(keys), (x.samples, tiles))
    full = np.zeros(count.shape, int) if pattern.causal else count
    if pattern.token_mask is not None:
        full = jnp.where(_some(~pattern.token_mask, ROWS), 0, full)
        count = jnp.where(_some(pattern.token_mask, ROWS), count, 0)
    cols = x.rows_from // x.block_q + np.arange(blocks)
    return _Lists(full[:, None], count[:, None], np.broadcast_to(cols, (1, tiles, blocks)))


def _blocks_of_rows(keys: Keys):
    """Blocks of global rows in use `[samples, 1]`."""
    return -(-jnp.maximum(keys.pattern.num_rows, 0)[:, None] // keys.problem.block_q)


def _below(keys: Keys, upper: _Lists, lower: _Lists) -> _Lists:
    """Lists with other row tiles behind theirs, of all heads alike."""
    (heads, rows, width), (_, more, wider) = upper.cols.shape, lower.cols.shape
    total = max(width, wider)

    def grown(y, before: int, after: int, fill: int = 0):  # with rows to either side, and entries
        places = (0, 0), (before, after), (0, total - y.shape[-1])
        return _xp(y).pad(y, places, constant_values=fill)

    def join(y, z):
        shape = max(len(y), len(z)), heads
        of_rows = lambda a, size: _broadcast(a, (*shape, size))
        return joined([(of_rows(y, rows), rows), (of_rows(z, more), more)])

    return _Lists(
        join(upper.full, lower.full),
        join(upper.count, lower.count),
        grown(upper.cols, 0, more) + grown(lower.cols, rows, 0),
        None if upper.bits is None else grown(upper.bits, 0, more, -1),
    )


def _per_sample(keys: Keys, lists: _Lists) -> TileLists:
    x = keys.problem
    rows = lists.cols.shape[1]
    flat = lambda y: _broadcast(y, (x.samples, x.P, rows)).reshape(x.owners, rows)
    int32 = lambda y: jnp.asarray(y, jnp.int32)
    count = mark_invalid(keys.pattern, lists.count)
    bits = None if lists.bits is None else int32(lists.bits)
    return TileLists(int32(flat(lists.full)), int32(flat(count)), int32(lists.cols), bits)


def _xp(*arrays):
    """NumPy for constants, as long as no array is data."""
    return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def _broadcast(y, shape):
    return _xp(y).broadcast_to(y, shape)


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


def _ordered(held: Cover, packed: int = 0, packed_from: int = 0) -> _Lists:
    """Whole blocks first, then others, then all packed ones, which the counts leave out."""
    xp = _xp(held.present)
    heads, rows, blocks = held.present.shape
    rank = xp.where(held.whole, 0, xp.where(held.present, 1, 3))
    rank = xp.concatenate([rank, xp.full((heads, rows, packed), 2)], -1)
    width = rank.shape[-1] if xp is jnp else max(1, int((rank < 3).sum(-1).max()))
    order = xp.argsort(rank, axis=-1, stable=True)[..., :width]
    bits = held.bits
    if bits is not None:
        widths = (0, 0), (0, 0), (0, packed)  # what no rule asks about is seen by all rows
        bits = jnp.take_along_axis(jnp.pad(bits, widths, constant_values=-1), order, -1)
    cols = xp.where(order < blocks, order, order - blocks + packed_from)
    return _Lists((rank == 0).sum(-1)[None], (rank < 2).sum(-1)[None], cols, bits)
