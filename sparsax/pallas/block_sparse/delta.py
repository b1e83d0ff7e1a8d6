"""What a row of dS subtracts: delta = rowsum(o * do) - dlse, FlashAttention-2, section 3.1.2.

The kernel of dQ computes it of the row tiles it has at hand, and leaves it to that of dK and dV.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.config import Tiling
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.rows import QueryTile
from sparsax.pallas.block_sparse.schedule import Schedule
from sparsax.pallas.block_sparse.segments import Segments
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import MATRIX, ROW, SHARED_BYTES, WG_ROWS, zeros

STRIP = 64  # features at a time: all of them would not fit in the registers


def roomy(x: Problem, tiling: Tiling) -> bool:
    """Whether dQ has space of its own in shared memory; else it takes that of the queries."""
    return x.H * tiling.row_slots < 256 and _fit(x, tiling, 3 * tiling.row_slots + 1)


def outputs_fit(x: Problem, tiling: Tiling) -> bool:
    """Whether row tiles of o fit in shared memory, too; else registers read them from where o is.

    Nothing clips what registers read: o must then have whole row tiles.
    """
    return _fit(x, tiling, 3 * tiling.row_slots + roomy(x, tiling))


def _fit(x: Problem, tiling: Tiling, row_tiles: int) -> bool:
    """Whether shared memory holds so many row tiles beside keys, values and ids."""
    columns = tiling.stages * tiling.tile
    vectors = row_tiles * ROWS + 2 * columns
    return vectors * x.H * jnp.dtype(x.dtype).itemsize + 4 * columns * x.key_ids <= SHARED_BYTES


@dataclasses.dataclass(frozen=True)
class Deltas:
    """Where a warpgroup finds what delta is made of, and writes it."""

    outputs: Segments
    space: Any  # of row tiles of these in shared memory; None if they do not fit
    of_lse: list[Any]  # dlse `[B, N, T']`, where it is not 0
    target: Any  # `[B, N, T']`
    schedule: Schedule

    def start(self, work: QueryTile, first_row, place, cotangents, features: int):
        """A function that computes and writes the delta of a warpgroup's rows, and returns it.

        What is not in shared memory is read at once. `place` is where in space outputs arrive,
        `cotangents` where do does; it is called once both are there.
        """
        rows = pl.ds(first_row, WG_ROWS)
        at = work.sample, work.head, rows
        dlse = [plgpu.load(ref.at[at], layout=ROW, optimized=False) for ref in self.of_lse]
        strips = [pl.ds(i, min(STRIP, features - i)) for i in range(0, features, STRIP)]
        near = lambda ref, strip: plgpu.load(ref.at[:, strip], layout=MATRIX)
        far = None
        if self.space is None:
            far = self.outputs.load(first_row, lambda ref, first: [
                plgpu.load(
                    ref.at[work.sample, pl.ds(first, WG_ROWS), work.head, strip], layout=MATRIX,
                    optimized=False,
                ) for strip in strips
            ])  # fmt: skip

        def write(delta):
            self.target.at[at][...] = delta

        begins = work.there & self.schedule.begins_row(work.part)  # one piece of a row writes it
        pl.when(begins & (work.steps == 0))(lambda: write(zeros((WG_ROWS,), ROW)))

        def compute():
            total = zeros((WG_ROWS,), ROW)
            for i, strip in enumerate(strips):
                o = near(self.space.at[place], strip) if far is None else far[i]
                do = near(cotangents, strip)
                total += (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=1)
            for x in dlse:
                total -= x
            pl.when(begins)(lambda: write(total))
            return total

        return compute
