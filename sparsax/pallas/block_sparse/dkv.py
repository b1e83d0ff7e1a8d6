"""The kernel of dK and dV: row tiles of keys over the query blocks that list them.

Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, for the keys alone. All query heads of a
kv head are walked by one thread block, so their sum never leaves the registers. The parts of a
split row leave as float32 sums, which `combine.py` adds in order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse import masks, stream
from sparsax.pallas.block_sparse.problem import Columns, Problem
from sparsax.pallas.block_sparse.rows import Lists
from sparsax.pallas.block_sparse.schedule import Item, Schedule, part_types, units
from sparsax.pallas.block_sparse.segments import Segments, split
from sparsax.pallas.block_sparse.tiles import ROWS, Given
from sparsax.pallas.hopper import (
    COL,
    COMPUTE,
    LOG2E,
    MATRIX,
    REGISTERS,
    ROW,
    WG_ROWS,
    Ring,
    TensorCores,
    Turns,
    copying,
    launch,
    per_col,
    shared,
    zeros,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _HeadWalk:
    """The tiles of one query head's list that an item walks; scalars of the kernel."""

    head: Any
    pattern_head: Any
    full: Any
    count: Any  # below 0 if the pattern is not to be used
    first: Any
    last: Any


def dkv_kernel(
    x: Problem,
    schedule: Schedule,
    given: Given,
    *,
    tile: int,
    stages: int,
    turns: bool,
    row_slots: int,
    early: int,
    spaces: int,
    interpret,
    features: tuple[int, int] | None = None,
):
    """A function of `(table, [full], count, cols, [bits], [ids], *q, *k, *v, *do, lse, delta)`.

    lse and delta are as for dQ. It returns `*dk, *dv [B, S, K, H]`, or the given range of their
    features alone where registers cannot hold all of them, and float32 sums of the parts of split
    rows, `[part and copy, dk and dv, 128, H]`.
    """
    columns, cores = Columns(x.block_q, tile, x.kv_bounds), TensorCores(interpret is not None)
    low, high = features or (0, x.H)
    masked, gain = columns.masked(given.bits), x.scale * LOG2E
    # Of one sample; samples are told apart by the owner if it is one of theirs, else by the copy.
    owners, group = schedule.owners // x.samples, x.N // x.K
    sharing = x.K // owners

    def kernel(*refs, k_smem, v_smem, q_smem, do_smem, vectors_smem, ids_smem, out_smem,
               kv_bars, bars, turn_bars):  # fmt: skip
        lse_smem, delta_smem = (vectors_smem.at[i] for i in range(2))
        lists, refs = Lists.split(refs, given, x)
        of_queries, of_keys = x.q_starts, x.kv_starts
        q, k, v, do, (lse, delta, *refs) = split(refs, of_queries, of_keys, of_keys, of_queries)
        dk, dv, parts = split(refs, of_keys, of_keys)
        kv_ring, ring = Ring(kv_bars, row_slots), Ring(bars, stages)
        wg = lax.axis_index("wg")

        def where(item: Item):
            """`(sample, kv head)`."""
            shared_head = lax.rem(item.copy, jnp.int32(sharing))
            kv_head = lax.rem(item.owner, jnp.int32(owners)) * sharing + shared_head
            return item.copy // sharing + item.owner // owners, kv_head

        def each_head(item: Item, visit, carry):
            """`visit(walk, carry)` for the query heads of the item's kv head, in turn."""
            _, kv_head = where(item)
            there, row = item.row >= 0, jnp.maximum(item.row, 0)

            def go(g, state):
                passed, carry = state
                head = kv_head * group + g
                p = head // (x.N // x.P)
                list_of = item.owner // owners * x.P + p
                *full, count = (jnp.where(there, ref[list_of, row], 0) for ref in lists.of_row)
                full, count = full[0] if full else 0, lists.entries(count)
                entries = jnp.maximum(count, 0)
                work = units(entries, x.block_q)
                first, last = (jnp.clip(i - passed, 0, work) for i in (item.first, item.last))
                walk = _HeadWalk(head, p, full, count, *columns.span(first, last, entries))
                return passed + work, visit(walk, carry)

            return lax.fori_loop(0, group, go, (jnp.int32(0), carry))[1]

        @copying(wg, teams=1)
        def copy_tiles(_):
            def fill_tile(item: Item, carry):
                done, step = carry
                b, kv_head = where(item)

                @pl.when(item.row >= 0)
                def _():
                    kv_ring.reserve(done)
                    place = kv_ring.slot(done)
                    filled = kv_ring.filled.at[place]

                    for source, smem in ((k, k_smem), (v, v_smem)):

                        def bring(ref, first, smem=smem):
                            for i in range(COMPUTE):
                                at = b, pl.ds(first + i * WG_ROWS, WG_ROWS), kv_head
                                plgpu.copy_gmem_to_smem(ref.at[at], smem.at[place, i], filled)

                        source.at(item.row * ROWS, bring)

                def fill_head(walk: _HeadWalk, step):
                    index, head = (walk.pattern_head, item.row), walk.head

                    def fill(t, step):
                        slot = ring.slot(step)
                        begins = stream.starts(columns, lists.cols, index, walk.count, t)
                        ring.reserve(step)
                        bring = lambda source, part_of, smem: stream.copy(
                            columns, begins, source, part_of, smem.at[slot], ring.filled.at[slot]
                        )
                        for source, smem in ((q, q_smem), (do, do_smem)):
                            bring(source, lambda ref, rows: ref.at[b, rows, head], smem)
                        for ref, smem in ((lse, lse_smem), (delta, delta_smem)):
                            whole = Segments((ref,), (0,))
                            bring(whole, lambda ref, rows: ref.at[b, head, rows], smem)
                        for i in range(x.query_ids):
                            whole = Segments((lists.q_ids,), (0,))
                            part_of = lambda ref, rows, i=i: ref.at[b, x.of_head(head), i, rows]
                            bring(whole, part_of, ids_smem.at[:, i])
                        return step + 1

                    return lax.fori_loop(walk.first, walk.last, fill, step)

                step = each_head(item, fill_head, step)
                return done + jnp.where(item.row >= 0, 1, 0), step

            start = jnp.int32(0), jnp.int32(0)
            done, steps = schedule.each(lax.axis_index("item"), lists.table, fill_tile, start)
            kv_ring.drain(done)
            ring.drain(steps)

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(REGISTERS[1][1], action="increase")
            order = Turns(turn_bars, wg)
            order.open()
            row_in_tile = wg * WG_ROWS

            def differentiate(item: Item, carry):
                done, begun = carry
                b, kv_head = where(item)
                place = kv_ring.slot(done)
                keys, values = k_smem.at[place, wg], v_smem.at[place, wg]
                first_row = jnp.maximum(item.row, 0) * ROWS + row_in_tile
                rows = pl.ds(first_row, WG_ROWS)
                load = functools.partial(plgpu.load, layout=ROW, optimized=False)
                row_ids = tuple(
                    load(lists.kv_ids.at[b, x.of_head(kv_head), i, rows]) for i in range(x.key_ids)
                )

                def visit_head(walk: _HeadWalk, carry):
                    index = walk.pattern_head, jnp.maximum(item.row, 0)
                    count = jnp.maximum(walk.count, 0)

                    def find(t):
                        found = masks.pieces(columns, lists.cols, lists.bits, index, count, t,
                                             row_in_tile, x.block_kv)  # fmt: skip
                        if not x.rows_ask or columns.gather > 1:
                            return found, None
                        begins = stream.starts(columns, lists.cols, index, jnp.maximum(count, 1), t)
                        return found, begins[0] >= x.rows_from

                    def advance(t, found, carry):
                        dk_acc, dv_acc, step = carry
                        slot = ring.slot(step)
                        ring.wait(step)
                        of_cols = lambda smem: plgpu.load(smem.at[slot], layout=COL)

                        part = slot
                        if features is not None:
                            part = slot, slice(None), pl.ds(low, high - low)

                        def load_ids():
                            refs = (ids_smem.at[:, i] for i in range(x.query_ids))
                            return tuple(map(of_cols, refs))

                        def soon(load, level):
                            """`load`, which is done already where so much is to be early."""
                            if early < level:
                                return load
                            loaded = load()
                            return lambda: loaded

                        def probabilities(s, get_lse, get_ids):
                            weights = jnp.exp2(s * gain - per_col(get_lse(), s.shape))
                            if found is None:
                                return weights
                            ids = (row_ids, get_ids()) if x.ids else None
                            pieces, is_global = found
                            if x.rows_ask and columns.gather > 1:  # some pieces of a tile may be
                                is_global = x.rows_from
                            return masks.keep(
                                weights, 0.0, columns, pieces, first_row, x.block_kv, ids, is_global
                            )

                        def gradients(get_s, get_dp):
                            get_lse = soon(lambda: of_cols(lse_smem), 1)
                            get_ids = load_ids if found is None else soon(load_ids, 2)
                            s = get_s()
                            get_delta = soon(lambda: of_cols(delta_smem), 2)
                            weights = probabilities(s, get_lse, get_ids)

                            def beside_dv(get_dv):
                                dp = get_dp(since=1)
                                ds = weights * (dp - per_col(get_delta(), dp.shape))
                                owed = dk_acc, ds.astype(x.dtype), q_smem.at[part]
                                both = lambda get_dk: (get_dk(), get_dv())
                                return cores.start([owed], both)

                            owed = dv_acc, weights.astype(x.dtype), do_smem.at[part]
                            return cores.start([owed], beside_dv)

                        turned = lambda smem: smem.at[slot].transpose((1, 0))
                        order.take()
                        dk_acc, dv_acc = cores.start(
                            [(None, keys, turned(q_smem)), (None, values, turned(do_smem))],
                            gradients, order.give,
                        )  # fmt: skip
                        cores.release(ring, step)
                        return dk_acc, dv_acc, step + 1

                    *sums, poison = carry
                    sums = stream.walk(
                        walk.full, walk.last, columns, find if masked else None, walk.first,
                        advance, tuple(sums),
                    )  # fmt: skip
                    return *sums, poison + jnp.where(walk.count < 0, jnp.nan, 0.0)

                @pl.when(item.row >= 0)
                def _():
                    kv_ring.wait(done)

                zero = zeros((WG_ROWS, high - low), MATRIX)
                carry = zero, zero, begun, jnp.float32(0)
                dk_acc, dv_acc, begun, poison = each_head(item, visit_head, carry)
                results = (dk_acc * x.scale + poison, dk), (dv_acc + poison, dv)

                @pl.when(item.row >= 0)
                def _():
                    cores.release(kv_ring, done)

                def write():
                    for i, (gradient, target) in enumerate(results):
                        if spaces == 1 or i == 0:  # with one space for both, one after the other
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out = out_smem.at[min(i, spaces - 1), wg]
                        out[...] = gradient.astype(x.dtype)
                        plgpu.commit_smem()
                        target.at(first_row, lambda ref, first, out=out: plgpu.copy_smem_to_gmem(
                            out, ref.at[b, pl.ds(first, WG_ROWS), kv_head]
                        ))  # fmt: skip

                def write_part():
                    place = item.part * schedule.copies + item.copy
                    for i, (gradient, _) in enumerate(results):
                        parts[0].at[place, i, pl.ds(row_in_tile, WG_ROWS)][...] = gradient

                there = item.row >= 0
                if parts:
                    pl.when(there & (item.part >= 0))(write_part)
                pl.when(there & (item.part < 0))(write)
                return done + jnp.where(item.row >= 0, 1, 0), begun

            start = jnp.int32(0), jnp.int32(0)
            schedule.each(lax.axis_index("item"), lists.table, differentiate, start)
            order.close()
            plgpu.wait_smem_to_gmem(0)

    outs = [
        jax.ShapeDtypeStruct((x.B, -(-length // 8) * 8, x.K, high - low), x.dtype)
        for length in x.kv_lengths
    ]
    return launch(
        kernel,
        "block_sparse_dkv",
        schedule.thread_blocks,
        (*outs, *outs, *part_types(schedule, (2, ROWS, high - low))),
        interpret,
        teams=1,
        k_smem=shared((row_slots, COMPUTE, WG_ROWS, x.H), x.dtype),
        v_smem=shared((row_slots, COMPUTE, WG_ROWS, x.H), x.dtype),
        q_smem=shared((stages, tile, x.H), x.dtype),
        do_smem=shared((stages, tile, x.H), x.dtype),
        out_smem=shared((spaces, COMPUTE, WG_ROWS, high - low), x.dtype),
        vectors_smem=plgpu.SMEM((2, stages, tile), jnp.float32),  # one, as each begins at 1 KiB
        ids_smem=plgpu.SMEM((stages, x.query_ids, tile), jnp.int32) if x.ids else None,
        kv_bars=Ring.barriers(row_slots, 2 * COMPUTE),
        turn_bars=Turns.barrier(turns),
        bars=Ring.barriers(stages, columns.gather * (4 + x.query_ids)),
    )
