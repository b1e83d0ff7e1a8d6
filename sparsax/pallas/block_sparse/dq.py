"""The kernel of dQ: row tiles of queries over the key blocks they list.

Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, for the queries alone. The product that
adds a tile's share to dQ runs while the next tile's probabilities are computed.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse import stream
from sparsax.pallas.block_sparse.problem import Columns, Problem
from sparsax.pallas.block_sparse.rows import Lists, QueryTile, QueryTiles, query_types
from sparsax.pallas.block_sparse.schedule import Schedule, part_types
from sparsax.pallas.block_sparse.segments import split
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import (
    COMPUTE,
    LOG2E,
    MATRIX,
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
    x: Problem, schedule: Schedule, bits: bool, *, tile: int, stages: int, turns: bool,
    row_slots: int, one_warp: bool, interpret,
):  # fmt: skip
    """A function of `(table, full, count, cols, [bits], [ids], *q, *k, *v, *do, lse, delta)`.

    lse is in units of log 2 and infinite for a query that keeps nothing; both it and delta are
    `[B, N, T']`, T' all positions, padded to row tiles. It returns `*dq [B, T, N, H]`, and float32
    sums of the pieces of split rows, `[part and copy, 1, 128, H]`.
    """
    columns, cores = Columns(x.block_kv, tile, x.q_bounds), TensorCores(interpret is not None)
    masked, gain = columns.masked(bits), x.scale * LOG2E
    roomy = x.H * row_slots < 256

    def kernel(*refs, q_smem, do_smem, k_smem, v_smem, dq_smem, ids_smem, q_bars, k_bars, v_bars,
               turn_bars):  # fmt: skip
        lists, refs = Lists.split(refs, bits, x)
        of_queries, of_keys = x.q_starts, x.kv_starts
        q, k, v, do, (lse, delta, *refs) = split(refs, of_queries, of_keys, of_keys, of_queries)
        dq, parts = split(refs, of_queries)
        tiles = QueryTiles(x, columns, schedule, lists)
        q_ring, k_ring, v_ring = Ring(q_bars, row_slots), Ring(k_bars, stages), Ring(v_bars, stages)
        wg = lax.axis_index("wg")

        @copying(wg, one_warp)
        def copy(team):
            of_rows = [(q, q_smem), (do, do_smem)]
            tiles.copy(team, of_rows, q_ring, k, v, k_smem, v_smem, ids_smem, k_ring, v_ring)

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            order = Turns(turn_bars, wg)
            order.open()

            def write(place, acc, poison=0.0, out=None):
                """A row's gradients; `place`: its row tile, sample, head and part."""
                row, sample, head, part = place
                result = acc * x.scale + poison

                def write_whole():
                    space = dq_smem.at[wg] if out is None else out
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    space[...] = result.astype(x.dtype)
                    plgpu.commit_smem()
                    dq.at(row * ROWS + wg * WG_ROWS, lambda ref, first: plgpu.copy_smem_to_gmem(
                        space, ref.at[sample, pl.ds(first, WG_ROWS), head]
                    ))  # fmt: skip

                def write_part():
                    parts[0].at[part, 0, pl.ds(wg * WG_ROWS, WG_ROWS)][...] = result

                @pl.when(row >= 0)
                def _():
                    if parts:
                        pl.when(part >= 0)(write_part)
                    pl.when(part < 0)(write_whole)

            none = zeros((WG_ROWS, x.H), MATRIX)
            # Of the row before: its place, sum and last tile's share, still to be added.
            nothing_owed = (
                (jnp.int32(-1),) * 4,
                (none, plgpu.layout_cast(jnp.zeros((WG_ROWS, tile), x.dtype), MATRIX)),
            )

            def owed(sums, step):  # the product that adds a tile's share to dQ
                acc, ds = sums
                return acc, ds, k_smem.at[k_ring.slot(step)]

            def settle(sums, end):
                acc = cores.start([owed(sums, end)], lambda get: get())
                cores.release(k_ring, end)
                return acc

            def differentiate(work: QueryTile, carry):
                done, begun, *held = carry
                owner, owed_sums = held or nothing_owed
                poison = jnp.where(work.count < 0, jnp.nan, 0.0)
                steps, place = work.steps, q_ring.slot(done)
                queries, cotangents = q_smem.at[place, wg], do_smem.at[place, wg]
                mine = work.row, work.sample, work.head, work.part
                first_row = jnp.maximum(work.row, 0) * ROWS + wg * WG_ROWS
                rows = pl.ds(first_row, WG_ROWS)
                of_rows = lambda ref: plgpu.load(
                    ref.at[work.sample, work.head, rows], layout=ROW, optimized=False
                )
                row_lse, row_delta = of_rows(lse), of_rows(delta)
                find, read, keep = tiles.mask(work, wg, ids_smem, of_whole=True)

                def products(step):
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

                def begin(late: bool):
                    found = find(work.first) if masked else None

                    def then(get_s, get_dp, get_acc=None):
                        ds = share(get_s, get_dp, begun, found)
                        settled = none
                        if get_acc is not None:
                            settled = get_acc()
                            cores.release(k_ring, begun - 1)
                        return settled, (none, ds.astype(x.dtype))

                    started = products(begun)
                    if late:
                        started.append(owed(owed_sums, begun - 1))
                    order.take()
                    settled, sums = cores.start(started, then, order.give)
                    return owner if late else nothing_owed[0], settled, sums

                def advance(t, found, sums):
                    step = begun + t - work.first

                    def then(get_s, get_dp, get_acc):
                        ds = share(get_s, get_dp, step, found)
                        acc = get_acc()
                        cores.release(k_ring, step - 1)
                        # Rounded no sooner: the registers were feeding the product just awaited.
                        return acc, ds.astype(x.dtype)

                    started = [*products(step), owed(sums, step - 1)]
                    order.take()
                    return cores.start(started, then, order.give)

                @pl.when(work.there)
                def _():
                    q_ring.wait(done)

                if roomy:
                    either = lambda: lax.cond(
                        owner[0] >= 0, lambda: begin(True), lambda: begin(False)
                    )
                    empty = lambda: (mine, none, owed_sums)
                    whose, settled, sums = lax.cond(steps > 0, either, empty)
                    write(whose, settled, jnp.where(steps > 0, 0.0, poison))
                else:
                    fresh = lambda: nothing_owed[1]
                    sums = lax.cond(steps > 0, lambda: begin(False)[2], fresh)
                sums = stream.walk(
                    work.full, work.last, columns, find if masked else None, work.first + 1,
                    advance, sums,
                )  # fmt: skip
                if roomy:
                    pl.when(work.there)(lambda: q_ring.release(done))
                    owner = tuple(
                        jnp.where(steps > 0, a, b) for a, b in zip(mine, owner, strict=True)
                    )
                    held = owner, sums
                else:
                    end = begun + steps - 1
                    settled = lax.cond(steps > 0, lambda: settle(sums, end), lambda: sums[0])
                    write(mine, settled, poison, queries)

                    @pl.when(work.there)
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        q_ring.release(done)

                return done + jnp.where(work.there, 1, 0), begun + steps, *held

            start = jnp.int32(0), jnp.int32(0), *(nothing_owed if roomy else ())
            _, begun, *held = tiles.each(0, differentiate, start)
            if roomy:
                owner, sums = held
                there = owner[0] >= 0
                write(owner, lax.cond(there, lambda: settle(sums, begun - 1), lambda: none))
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
        one_warp=one_warp,
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
