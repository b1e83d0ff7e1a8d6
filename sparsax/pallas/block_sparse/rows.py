"""What the kernels of queries share: a thread block's row tiles, and the copies of keys and values.

The forward pass and dQ both hold a row tile of queries and walk the key blocks that it lists.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse import masks, stream
from sparsax.pallas.block_sparse.problem import Columns, Problem
from sparsax.pallas.block_sparse.schedule import Item, Schedule
from sparsax.pallas.block_sparse.segments import Segments
from sparsax.pallas.block_sparse.tiles import ROWS, Given, unusable
from sparsax.pallas.hopper import COL, COMPUTE, ROW, WG_ROWS, Ring


@dataclasses.dataclass(frozen=True)
class Lists:
    """References to the lists and ids that every kernel reads, from its leading operands."""

    table: Any
    full: Any
    count: Any
    cols: Any
    bits: Any
    q_ids: Any
    kv_ids: Any
    every: Any

    @classmethod
    def split(cls, refs, given: Given, x: Problem):
        """The lists, and the operands that follow them."""
        table, *rest = refs
        full = rest.pop(0) if given.full else None
        count, cols, *rest = rest
        bits = rest.pop(0) if given.bits else None
        ids = (rest.pop(0), rest.pop(0)) if x.ids else (None, None)
        every = (rest.pop(0), rest.pop(0)) if given.every else None
        return cls(table, full, count, cols, bits, *ids, every), rest

    @property
    def of_row(self) -> tuple[Any, ...]:
        """What is read of each row: `full`, if there is one, and `count`."""
        return (self.count,) if self.full is None else (self.full, self.count)

    def entries(self, count):
        """Entries of a list, below 0 if it has more than it can hold."""
        return jnp.where(count > self.cols.shape[-1], INVALID, count)


def query_types(x: Problem) -> list[jax.ShapeDtypeStruct]:
    """What a kernel writes of queries: lengths that tile copies accept."""
    return [
        jax.ShapeDtypeStruct((x.B, -(-length // 8) * 8, x.N, x.H), x.dtype)
        for length in x.q_lengths
    ]


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """One row tile of queries; scalars of the kernel."""

    row: Any  # -1: nothing to do
    pattern_head: Any
    sample: Any
    head: Any
    kv_head: Any
    first: Any  # tiles of the list from here
    last: Any  # to here
    part: Any  # where the sums go if this is a piece of a row; -1 if it is the whole row
    full: Any  # entries of the list that need no mask
    count: Any  # entries of the list; below 0 if the pattern is not to be used

    @property
    def there(self):
        """Whether there is anything to do."""
        return self.row >= 0

    @property
    def steps(self):
        """Tiles to walk."""
        return self.last - self.first


@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """The row tiles of queries that a team does, one after another."""

    problem: Problem
    columns: Columns
    schedule: Schedule
    lists: Lists

    def tile(self, item: Item) -> QueryTile:
        """The row tile that an item of the schedule means."""
        x = self.problem
        sharing = x.N // x.P
        p = lax.rem(item.owner, jnp.int32(x.P))
        head = p * sharing + lax.rem(item.copy, jnp.int32(sharing))
        # Samples are told apart by the owner if it is one of theirs, else by the copy.
        sample, kv_head = item.copy // sharing + item.owner // x.P, head // (x.N // x.K)
        *full, count = item.extra
        full, count = full[0] if full else 0, self.lists.entries(count)
        first, last = self.columns.span(item.first, item.last, jnp.maximum(count, 0))
        place = jnp.where(item.part >= 0, item.part * self.schedule.copies + item.copy, -1)
        return QueryTile(item.row, p, sample, head, kv_head, first, last, place, full, count)

    def each(self, team, visit, carry):
        """`visit(tile, carry)` for the tiles of a team of the thread block in turn."""
        number = self.schedule.number(lax.axis_index("item"), team)
        go = lambda item, carry: visit(self.tile(item), carry)
        return self.schedule.each(number, self.lists.table, go, carry, self.lists.of_row)

    def poison(self, team, widths: tuple[int, int]):
        """NaN if any list of the head of a team's only row is not to be used, else 0.

        Each list is read alone: what is asked of few rows alone is few reads, all in flight at once
        while the first tiles arrive. `widths`: of `Every`.
        """
        s = self.schedule
        number = s.number(lax.axis_index("item"), team)
        owner = jnp.minimum(number, s.rows * s.copies - 1) // (s.copies * s.tiles)
        wrong = jnp.int32(0)
        for counts, most in zip(self.lists.every, widths, strict=True):
            for i in range(counts.shape[-1]):
                wrong += jnp.where(unusable(counts[owner, i], most), 1, 0)
        return jnp.where(wrong > 0, jnp.nan, 0.0)

    def copy(
        self, team, of_rows, rows_ring: Ring, k: Segments, v: Segments, k_smem, v_smem, ids_smem,
        k_ring, v_ring,
    ):  # fmt: skip
        """Copies for a team: `of_rows` (arrays and space) once a tile, then keys and values."""
        x, columns, lists, cols = self.problem, self.columns, self.lists, self.lists.cols

        def fill_tile(work: QueryTile, carry):
            done, begun = carry
            b, r, kv_head, count = work.sample, work.row, work.kv_head, jnp.maximum(work.count, 0)

            @pl.when(work.there)
            def _():
                rows_ring.reserve(done)
                place = rows_ring.slot(done)
                for source, smem in of_rows:

                    def bring(ref, first, smem=smem):
                        for i in range(COMPUTE):
                            rows = pl.ds(first + i * WG_ROWS, WG_ROWS)
                            plgpu.copy_gmem_to_smem(
                                ref.at[b, rows, work.head], smem.at[place, i],
                                rows_ring.filled.at[place],
                            )  # fmt: skip

                    source.at(r * ROWS, bring)

            def fill(t, _):
                step = begun + t - work.first
                slot = k_ring.slot(step)
                begins = stream.starts(columns, cols, (work.pattern_head, r), count, t)

                def bring(source, smem, ring):
                    of_head = lambda ref, rows: ref.at[b, rows, kv_head]
                    stream.copy(
                        columns, begins, source, of_head, smem.at[slot], ring.filled.at[slot]
                    )

                k_ring.reserve(step)
                bring(k, k_smem, k_ring)
                if ids_smem is not None:
                    nowhere = lists.kv_ids.shape[-1] - ROWS
                    places = stream.absent(columns, begins, count, t, nowhere)
                    for i in range(x.key_ids):
                        stream.copy(
                            columns, places, Segments((lists.kv_ids,), (0,)),
                            lambda ref, cols, i=i: ref.at[b, x.of_head(kv_head), i, cols],
                            ids_smem.at[slot, i], k_ring.filled.at[slot],
                        )  # fmt: skip
                v_ring.reserve(step)
                bring(v, v_smem, v_ring)

            lax.fori_loop(work.first, work.last, fill, None)
            return done + jnp.where(work.there, 1, 0), begun + work.steps

        done, steps = self.each(team, fill_tile, (jnp.int32(0), jnp.int32(0)))
        rows_ring.drain(done)
        k_ring.drain(steps)
        v_ring.drain(steps)

    def mask(self, work: QueryTile, wg, ids_smem, of_whole: bool):
        """`find(tile)` and `read(slot)`, to be called early, and `keep` for a warpgroup.

        `keep(values, fill, found, key_ids, slot)` puts `fill` where a pair does not attend, from
        what these gave of the tile in a slot.
        `of_whole`: it is called for tiles that need no mask, too.
        """
        x, lists = self.problem, self.lists
        row_in_tile = wg * WG_ROWS
        first_row = jnp.maximum(work.row, 0) * ROWS + row_in_tile
        at, count = (work.pattern_head, jnp.maximum(work.row, 0)), jnp.maximum(work.count, 0)
        rows, head = pl.ds(first_row, WG_ROWS), x.of_head(work.head)
        row_ids = tuple(
            plgpu.load(lists.q_ids.at[work.sample, head, i, rows], layout=ROW, optimized=False)
            for i in range(x.query_ids)
        )

        def find(tile):
            return masks.pieces(
                self.columns, lists.cols, lists.bits, at, count, tile, row_in_tile, x.block_q
            )

        def load_ids(slot):
            refs = (ids_smem.at[slot, i] for i in range(x.key_ids))
            return tuple(plgpu.load(ref, layout=COL) for ref in refs)

        def read(slot):  # for other features there are no registers to hold them meanwhile
            return load_ids(slot) if x.ids and x.H == 64 and self.schedule.teams == 1 else None

        def keep(values, fill, found, key_ids, slot):
            key_ids = load_ids(slot) if x.ids and key_ids is None else key_ids
            ids = (row_ids, key_ids) if x.ids else None
            ask = x.rows_ask and (of_whole or not x.whole_rows)
            is_global = work.row * ROWS >= x.rows_from if ask else None
            return masks.keep(
                values, fill, self.columns, found, first_row, x.block_q, ids, is_global
            )

        return find, read, keep
