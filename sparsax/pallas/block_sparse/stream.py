"""How the copying warpgroup brings tiles of listed columns to shared memory."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import Columns
from sparsax.pallas.block_sparse.segments import Segments


def starts(columns: Columns, cols_ref, index, count, tile) -> list[Any]:
    """First column of each piece of a tile; past the list's end the last block, to be masked."""
    entries = (columns.entry(tile, piece) for piece in range(columns.gather))
    return [
        columns.position(cols_ref[(*index, jnp.minimum(entry, count - 1))], tile)
        for entry in entries
    ]


def absent(columns: Columns, begins, count, tile, nowhere: int) -> list[Any]:
    """The same, but `nowhere` for pieces past the list's end."""
    if columns.gather == 1:
        return begins
    return [
        jnp.where(columns.entry(tile, piece) < count, begin, nowhere)
        for piece, begin in enumerate(begins)
    ]


def copy(columns: Columns, begins, source: Segments, part_of, slot_ref, filled) -> None:
    """Starts the copies of a tile's pieces.

    `part_of(reference, columns)` is the memory of a run of columns in a reference of the source.
    """
    for piece, begin in enumerate(begins):
        part = slot_ref.at[pl.ds(piece * columns.width, columns.width)]

        def bring(ref, begin, part=part):
            plgpu.copy_gmem_to_smem(part_of(ref, pl.ds(begin, columns.width)), part, filled)

        source.at(begin, bring)


def walk(full, last, columns: Columns, find, first, visit, carry):
    """Visits tiles `first` to `last` of a list: `visit(tile, found, carry)`.

    `found` is what `find(tile)` read of a tile that may need a mask, before the tile ahead of it
    was visited; None of others. Without `find` no tile needs a mask.
    """
    end = last if find is None else jnp.clip(columns.full_tiles(full), first, last)
    carry = lax.fori_loop(first, end, lambda i, c: visit(i, None, c), carry)
    if find is None:
        return carry

    def go(tile, state):
        found, carry = state
        return find(tile + 1), visit(tile, found, carry)

    return lax.fori_loop(end, last, go, (find(end), carry))[1]
