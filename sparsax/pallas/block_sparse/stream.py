"""How the copying warpgroup brings tiles of listed columns to shared memory."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import Columns


def starts(columns: Columns, cols_ref, index, count, tile) -> list[Any]:
    """First column of each piece of a tile; past the list's end the last block, to be masked."""
    entries = (columns.entry(tile, piece) for piece in range(columns.gather))
    return [
        columns.position(cols_ref[(*index, jnp.minimum(entry, count - 1))], tile)
        for entry in entries
    ]


def copy(columns: Columns, begins, source, slot_ref, filled, packed=None, packed_from=0) -> None:
    """Starts the copies of a tile's pieces; `source` gives the memory of a run of columns.

    With `packed`, that gives the memory of those from position `packed_from` on.
    """
    for piece, begin in enumerate(begins):
        part = slot_ref.at[pl.ds(piece * columns.width, columns.width)]

        def bring(source, begin, part=part):
            plgpu.copy_gmem_to_smem(source(pl.ds(begin, columns.width)), part, filled)

        if packed is None:
            bring(source, begin)
        else:
            either(begin < packed_from, bring, (source, begin), (packed, begin - packed_from))


def either(condition, run, then, otherwise) -> None:
    """`run(*then)` if a scalar of the kernel is true, else `run(*otherwise)`."""
    pl.when(condition)(lambda: run(*then))
    pl.when(jnp.logical_not(condition))(lambda: run(*otherwise))


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
