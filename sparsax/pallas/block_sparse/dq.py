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
    """A function of `([table], full, count, cols, [bits], [ids], *q, *k, *v, *do, lse, delta)`.

    lse is in units of log 2 and infinite for a query that keeps nothing; both it and delta are
    `[B, N, T']`, T' all positions, padded to row tiles. It returns `*dq [B, T, N, H]`, and float32
    sums of the pieces of split rows, `[part and copy, 1, 128, H]`.
    """
    columns, cores = Columns(x.block_kv, tile, x.q_bounds), TensorCores(interpret is not None)
    masked, gain = columns.masked(bits), x.scale * LOG2E
    roomy = x.H * row_slots < 256

    def kernel(*refs, q_smem, do_smem, k_smem, v_smem, dq_smem, ids_smem, q_bars, k_bars, v_bars,
               turn_bars):  # fmt: skip
        lists, refs = Lists.split(refs, schedule, bits, x)
        of_queries, of_keys = x.q_starts, x.kv_starts
        q, k, v, do, (lse, delta, *refs) = split(refs, of_queries, of_keys, of_keys, of_queries)
        dq, parts = split(refs, of_queries)
        tiles = QueryTiles(x, columns, schedule, lists)
        q_ring, k_ring, v_ring = Ring(q_bars, row_slots), Ring(k_bars, stages), Ring(v_bars, stages)
        wg = lax.axis_index("wg")

        @copying(wg, one_warp)
        def copy():
            of_rows = [(q, q_smem), (do, do_smem)]
            tiles.copy(of_rows, q_ring, k, v, k_smem, v_smem, ids_smem, k_ring, v_ring)

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            order = Turns(turn_bars, wg)
            order.open()

            def differentiate(work: QueryTile, carry):
                done, begun = carry
                poison = jnp.where(work.count < 0, jnp.nan, 0.0)
                steps, place = work.steps, q_ring.slot(done)
                queries, cotangents = q_smem.at[place, wg], do_smem.at[place, wg]
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
                    return scores, (None, cotangents, turned(v_smem, v_ring))

                def probabilities(get_s, step, found):
                    slot = k_ring.slot(step)
                    ids = None if found is None else read(slot)  # while the product runs
                    s = get_s()
                    weights = jnp.exp2(s * gain - per_row(row_lse, s.shape))
                    return weights if found is None else keep(weights, 0.0, found, ids, slot)

                def logit_gradients(weights, dp, step):
                    cores.release(v_ring, step)
                    return weights * (dp - per_row(row_delta, dp.shape))

                def owed(carry, step):  # the product that adds a tile's share to dQ
                    acc, ds = carry
                    return acc, ds, k_smem.at[k_ring.slot(step)]

                def first(carry):
                    found = find(work.first) if masked else None

                    def then(get_s, get_dp):
                        weights = probabilities(get_s, begun, found)
                        return logit_gradients(weights, get_dp(), begun).astype(x.dtype)

                    started = [*products(begun)]
                    order.take()
                    return carry[0], cores.start(started, then, order.give)

                def advance(t, found, carry):
                    step = begun + t - work.first
                    scores, dps = products(step)

                    def then(get_s, get_dp, get_acc):
                        weights = probabilities(get_s, step, found)
                        ds = logit_gradients(weights, get_dp(), step)
                        acc = get_acc()
                        cores.release(k_ring, step - 1)
                        # Rounded no sooner: the registers were feeding the product just awaited.
                        return acc, ds.astype(x.dtype)

                    order.take()
                    return cores.start([scores, dps, owed(carry, step - 1)], then, order.give)

                def last(carry):
                    end = begun + steps - 1
                    acc = cores.start([owed(carry, end)], lambda get: get())
                    cores.release(k_ring, end)
                    return acc, carry[1]

                @pl.when(work.there)
                def _():
                    q_ring.wait(done)

                none = plgpu.layout_cast(jnp.zeros((WG_ROWS, tile), x.dtype), MATRIX)
                carry = zeros((WG_ROWS, x.H), MATRIX), none
                carry = lax.cond(steps > 0, first, lambda carry: carry, carry)
                carry = stream.walk(
                    work.full, work.last, columns, find if masked else None, work.first + 1,
                    advance, carry,
                )  # fmt: skip
                if roomy:
                    pl.when(work.there)(lambda: q_ring.release(done))
                acc, _ = lax.cond(steps > 0, last, lambda carry: carry, carry)

                result = acc * x.scale + poison

                def write():
                    out = dq_smem.at[wg] if roomy else queries
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = result.astype(x.dtype)
                    plgpu.commit_smem()
                    dq.at(first_row, lambda ref, first: plgpu.copy_smem_to_gmem(
                        out, ref.at[work.sample, pl.ds(first, WG_ROWS), work.head]
                    ))  # fmt: skip

                def write_part():
                    parts[0].at[work.part, 0, pl.ds(wg * WG_ROWS, WG_ROWS)][...] = result

                @pl.when(work.there)
                def _():
                    if parts:
                        pl.when(work.part >= 0)(write_part)
                    pl.when(work.part < 0)(write)
                    if not roomy:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        q_ring.release(done)

                return done + jnp.where(work.there, 1, 0), begun + steps

            tiles.each(differentiate, (jnp.int32(0), jnp.int32(0)))
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
