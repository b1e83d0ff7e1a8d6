"""The first pass: the log-sum-exp of every row, with no values.

Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 1, without the product with V.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import (
    COL,
    COMPUTE,
    LOG2E,
    LOWEST,
    ROW,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    full,
    launch,
    per_row,
    shared,
    zeros,
)  # fmt: skip
from sparsax.pallas.score_map import scores


def lse_kernel(x: Problem, interpret):
    """A function of `([q_ids, kv_ids], q, k)` that returns `lse [B, N, T']`, in units of log 2.

    T' is T padded to row tiles. A row that keeps nothing has lse = inf, so that all of its
    probabilities are zero.
    """
    columns, cores = scores.columns_of(x), TensorCores(interpret is not None)
    tile, gain, masked = columns.tile, x.scale * LOG2E, columns.masked(False)
    row_tiles, kv_tiles = -(-x.T // ROWS), -(-x.S // columns.tile)
    slot = tile * x.H * x.dtype.itemsize
    stages = scores.stages(slot, ROWS * x.H * x.dtype.itemsize)

    def kernel(*refs, q_smem, k_smem, ids_smem, lse_smem, q_bar, bars):
        (q_ids, kv_ids), (q, k, lse) = scores.split_ids(refs, x.ids)
        ring, wg, item = Ring(bars, stages), lax.axis_index("wg"), lax.axis_index("item")
        copy = item // row_tiles
        row = row_tiles - 1 - lax.rem(item, jnp.int32(row_tiles))  # of causal ones the longest
        sample, head = copy // x.N, lax.rem(copy, jnp.int32(x.N))
        steps, whole = jnp.int32(kv_tiles), jnp.int32(0 if x.ids else x.S // tile)
        if x.right is not None:
            steps = jnp.minimum(steps, ((row + 1) * ROWS - 1) // tile + 1)
            whole = jnp.minimum(whole, (row * ROWS + 1) // tile)

        @copying(wg)
        def copy_tiles():
            for i in range(COMPUTE):
                rows = pl.ds(row * ROWS + i * WG_ROWS, WG_ROWS)
                plgpu.copy_gmem_to_smem(q.at[sample, rows, head], q_smem.at[i], q_bar)

            def fill(step, _):
                slot, keys = ring.slot(step), pl.ds(step * tile, tile)
                ring.reserve(step)
                scores.copy_keys(
                    k, kv_ids, sample, head // (x.N // x.K), keys, k_smem.at[slot],
                    ids_smem.at[slot] if x.ids else None, ring.filled.at[slot],
                )  # fmt: skip

            lax.fori_loop(0, steps, fill, None)
            ring.drain(steps)

        @pl.when(wg < COMPUTE)
        def sum_up():
            plgpu.set_max_registers(232, action="increase")
            first_row = row * ROWS + wg * WG_ROWS
            rows, row_ids = pl.ds(first_row, WG_ROWS), None
            if x.ids:
                row_ids = plgpu.load(q_ids.at[sample, rows], layout=ROW, optimized=False)
            plgpu.barrier_wait(q_bar)

            def operands(step):
                return q_smem.at[wg], k_smem.at[ring.slot(step)].transpose((1, 0))

            def mask(s, step):
                ids = None
                if x.ids:
                    ids = row_ids, plgpu.load(ids_smem.at[ring.slot(step)], layout=COL)
                return jnp.where(scores.kept(columns, first_row, step, ids), s, -jnp.inf)

            def prepare(step, partial):
                return lambda get: mask(get() * gain, step) if partial else get() * gain

            def use(s, carry):
                top, total = carry
                new_top = jnp.maximum(top, s.max(axis=1))
                weights = jnp.exp2(s - per_row(new_top, s.shape)).sum(axis=1)
                return new_top, total * jnp.exp2(top - new_top) + weights

            carry = full((WG_ROWS,), LOWEST, ROW), zeros((WG_ROWS,), ROW)
            top, total = scores.each_tile(
                cores,
                ring,
                0,
                steps,
                operands,
                prepare,
                use,
                carry,
                whole if masked else None,
            )
            empty = total == 0.0
            found = top + jnp.log2(jnp.where(empty, 1.0, total))
            lse_smem.at[wg][...] = jnp.where(empty, jnp.inf, found)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[sample, head, rows])
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel,
        "score_map_lse",
        x.B * x.N * row_tiles,
        (jax.ShapeDtypeStruct((x.B, x.N, row_tiles * ROWS), jnp.float32),),
        interpret,
        q_smem=shared((COMPUTE, WG_ROWS, x.H), x.dtype),
        k_smem=shared((stages, tile, x.H), x.dtype),
        ids_smem=plgpu.SMEM((stages, tile), jnp.int32) if x.ids else None,
        lse_smem=plgpu.SMEM((COMPUTE, WG_ROWS), jnp.float32),
        q_bar=plgpu.Barrier(num_arrivals=COMPUTE),
        bars=Ring.barriers(stages, 2 if x.ids else 1),
    )
