"""The kernel of dQ: row tiles of queries over the key blocks they list.

Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, for the queries alone. The product that
adds a tile's share to dQ runs while the next tile's probabilities are computed.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse import stream
from sparsax.pallas.block_sparse.handover import Handover, Row
from sparsax.pallas.block_sparse.problem import Columns, Problem
from sparsax.pallas.block_sparse.rows import Lists, QueryTile, QueryTiles, query_types
from sparsax.pallas.block_sparse.schedule import Schedule, part_types
from sparsax.pallas.block_sparse.segments import split
from sparsax.pallas.block_sparse.tiles import ROWS, Given
from sparsax.pallas.hopper import (
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
    per_row,
    shared,
    zeros,
)  # fmt: skip


def dq_kernel(
    x: Problem, schedule: Schedule, given: Given, *, tile: int, stages: int, turns: bool,
    row_slots: int, interpret,
):  # fmt: skip
    """A function of `(table, [full], count, cols, [bits], [ids], *q, *k, *v, *do, lse, delta)`.

    lse is in units of log 2 and infinite for a query that keeps nothing; both it and delta are
    `[B, N, T']`, T' all positions, padded to row tiles. It returns `*dq [B, T, N, H]`, and float32
    sums of the pieces of split rows, `[part and copy, 1, 128, H]`.
    """
    columns, cores = Columns(x.block_kv, tile, x.q_bounds), TensorCores(interpret is not None)
    masked, gain = columns.masked(given.bits), x.scale * LOG2E
    roomy = x.H * row_slots < 256

    def kernel(*refs, q_smem, do_smem, k_smem, v_smem, dq_smem, ids_smem, q_bars, k_bars, v_bars,
               turn_bars):  # fmt: skip
        lists, refs = Lists.split(refs, given, x)
        of_queries, of_keys = x.q_starts, x.kv_starts
        q, k, v, do, (lse, delta, *refs) = split(refs, of_queries, of_keys, of_keys, of_queries)
        dq, parts = split(refs, of_queries)
        tiles = QueryTiles(x, columns, schedule, lists)
        q_ring, k_ring, v_ring = Ring(q_bars, row_slots), Ring(k_bars, stages), Ring(v_bars, stages)
        wg = lax.axis_index("wg")

        @copying(wg, teams=1)
        def copy(team):
            of_rows = [(q, q_smem), (do, do_smem)]
            tiles.copy(team, of_rows, q_ring, k, v, k_smem, v_smem, ids_smem, k_ring, v_ring)

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(REGISTERS[1][1], action="increase")
            order = Turns(turn_bars, wg)
            order.open()

            def write(place, settled, poison, space):
                row, sample, head, part = place
                result = settled[0] * x.scale + poison

                def write_whole():
                    out = dq_smem.at[wg] if space is None else space
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = result.astype(x.dtype)
                    plgpu.commit_smem()
                    dq.at(row * ROWS + wg * WG_ROWS, lambda ref, first: plgpu.copy_smem_to_gmem(
                        out, ref.at[sample, pl.ds(first, WG_ROWS), head]
                    ))  # fmt: skip

                def write_part():
                    parts[0].at[part, 0, pl.ds(wg * WG_ROWS, WG_ROWS)][...] = result

                @pl.when(row >= 0)
                def _():
                    if parts:
                        pl.when(part >= 0)(write_part)
                    pl.when(part < 0)(write_whole)

            none = (zeros((WG_ROWS, x.H), MATRIX),)
            no_share = plgpu.layout_cast(jnp.zeros((WG_ROWS, tile), x.dtype), MATRIX)

            def owing(sums, step):  # the product that adds a tile's share to dQ
                acc, ds = sums
                return acc, ds, k_smem.at[k_ring.slot(step)]

            def settle(sums, step):
                acc = cores.start([owing(sums, step)], lambda get: get())
                cores.release(k_ring, step)
                return (acc,)

            def start(work: QueryTile, done, begun) -> Row:
                place = q_ring.slot(done)
                queries, cotangents = q_smem.at[place, wg], do_smem.at[place, wg]
                rows = pl.ds(jnp.maximum(work.row, 0) * ROWS + wg * WG_ROWS, WG_ROWS)
                of_rows = lambda ref: plgpu.load(
                    ref.at[work.sample, work.head, rows], layout=ROW, optimized=False
                )
                row_lse, row_delta = of_rows(lse), of_rows(delta)
                find, read, keep = tiles.mask(work, wg, ids_smem, of_whole=True)

                def products(step) -> list[Any]:
                    k_ring.wait(step)
                    v_ring.wait(step)
                    turned = lambda smem, ring: smem.at[ring.slot(step)].transpose((1, 0))
                    scores = None, queries, turned(k_smem, k_ring)
                    return [scores, (None, cotangents, turned(v_smem, v_ring))]

                def share(get_s, get_dp, step, found):
                    slot = k_ring.slot(step)
                    ids = None if found is None else read(slot)  # while the product runs
                    s = get_s()
                    weights = jnp.exp2(s * gain - per_row(row_lse, s.shape))
                    if found is not None:
                        weights = keep(weights, 0.0, found, ids, slot)
                    dp = get_dp()
                    cores.release(v_ring, step)
                    return weights * (dp - per_row(row_delta, dp.shape))

                def begin(owed):
                    found = find(work.first) if masked else None

                    def then(get_s, get_dp, get_acc=None):
                        ds = share(get_s, get_dp, begun, found)
                        settled = none
                        if get_acc is not None:
                            settled = (get_acc(),)
                            cores.release(k_ring, begun - 1)
                        return settled, (*none, ds.astype(x.dtype))

                    started = products(begun)
                    if owed is not None:
                        started.append(owing(owed, begun - 1))
                    order.take()
                    return cores.start(started, then, order.give)

                def advance(t, found, sums):
                    step = begun + t - work.first

                    def then(get_s, get_dp, get_acc):
                        ds = share(get_s, get_dp, step, found)
                        acc = get_acc()
                        cores.release(k_ring, step - 1)
                        # Rounded no sooner: the registers were feeding the product just awaited.
                        return acc, ds.astype(x.dtype)

                    started = [*products(step), owing(sums, step - 1)]
                    order.take()
                    return cores.start(started, then, order.give)

                walk = lambda sums: stream.walk(
                    work.full, work.last, columns, find if masked else None, work.first + 1,
                    advance, sums,
                )  # fmt: skip
                return Row(begin, walk, queries)

            handover = Handover(roomy, none, (*none, no_share), settle, write)
            handover.each(tiles, 0, q_ring, start)
            order.close()
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel,
        "block_sparse_dq",
        schedule.thread_blocks,
        (
            *query_types(x),
            *part_types(schedule, (1, ROWS, x.H)),
        ),
        interpret,
        teams=1,
        q_smem=shared((row_slots, COMPUTE, WG_ROWS, x.H), x.dtype),
        do_smem=shared((row_slots, COMPUTE, WG_ROWS, x.H), x.dtype),
        k_smem=shared((stages, tile, x.H), x.dtype),
        v_smem=shared((stages, tile, x.H), x.dtype),
        dq_smem=shared((COMPUTE, WG_ROWS, x.H), x.dtype) if roomy else None,
        ids_smem=plgpu.SMEM((stages, x.key_ids, tile), jnp.int32) if x.ids else None,
        q_bars=Ring.barriers(row_slots, 2 * COMPUTE),
        k_bars=Ring.barriers(stages, columns.gather * (1 + x.key_ids)),
        v_bars=Ring.barriers(stages, columns.gather),
        turn_bars=Turns.barrier(turns),
    )
