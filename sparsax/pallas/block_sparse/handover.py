"""One row tile's end beside the beginning of the next.

A tile's last product has nothing of its own row left to hide behind. Where results have space of
their own, it runs together with the next row's first product, and its row is written after that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.rows import QueryTile, QueryTiles
from sparsax.pallas.hopper import Ring


class Row(NamedTuple):
    """How a kernel does one row tile of queries."""

    begin: Callable  # its first tile: `(settled, sums)` of the sums that another row still owes
    walk: Callable  # the other tiles: sums of sums
    space: Any  # of the queries; results go there if they have none of their own


class Handover(NamedTuple):
    """What a kernel does between row tiles.

    Attributes:
        late: whether results have space of their own, apart from the queries.
        settled: what is written of a row that sees nothing.
        owed: sums before the first tile; what they owe is a product of their last part.
        settle: `(sums, step) -> settled`, runs the product owed since a step.
        write: `(place, settled, poison, space)`; a place is `(row tile, sample, head, part)`.
    """

    late: bool
    settled: Any
    owed: Any
    settle: Callable
    write: Callable

    def each(
        self, tiles: QueryTiles, team, ring: Ring, start: Callable[[QueryTile, Any, Any], Row]
    ) -> None:
        """Does all row tiles of a team, `start(tile, number of it, number of its first step)`."""
        nobody = (jnp.int32(-1),) * 4

        def visit(work: QueryTile, carry):
            done, begun, *held = carry
            owner, owed = held or (nobody, self.owed)
            steps, mine = work.steps, (work.row, work.sample, work.head, work.part)
            poison = jnp.where(work.count < 0, jnp.nan, 0.0)  # and then there are no steps
            row = start(work, done, begun)
            pl.when(work.there)(lambda: ring.wait(done))
            if self.late:
                beside = lambda: (owner, *row.begin(owed))
                alone = lambda: (nobody, *row.begin(None))
                either = lambda: lax.cond(owner[0] >= 0, beside, alone)
                empty = lambda: (mine, self.settled, owed)
                whose, settled, sums = lax.cond(steps > 0, either, empty)
                self.write(whose, settled, jnp.where(steps > 0, 0.0, poison), None)
                sums = row.walk(sums)
                pl.when(work.there)(lambda: ring.release(done))
                pick = lambda new, old: jnp.where(steps > 0, new, old)
                held = tuple(map(pick, mine, owner)), sums
            else:
                sums = lax.cond(steps > 0, lambda: row.begin(None)[1], lambda: self.owed)
                sums = row.walk(sums)
                end = begun + steps - 1
                settled = lax.cond(
                    steps > 0, lambda: self.settle(sums, end), lambda: self.unowed(sums)
                )
                self.write(mine, settled, poison, row.space)

                @pl.when(work.there)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    ring.release(done)

            return done + jnp.where(work.there, 1, 0), begun + steps, *held

        first = jnp.int32(0), jnp.int32(0), *((nobody, self.owed) if self.late else ())
        _, begun, *held = tiles.each(team, visit, first)
        if self.late:
            owner, sums = held
            settled = lax.cond(
                owner[0] >= 0, lambda: self.settle(sums, begun - 1), lambda: self.settled
            )
            self.write(owner, settled, 0.0, None)

    def unowed(self, sums):
        """The sums without what they owe: what is settled already, where nothing is owed."""
        return sums[: len(self.settled)]
