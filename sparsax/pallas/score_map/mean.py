"""The second pass: tiles of the mean map, each summed over samples and heads in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.grouped_matmul.product import raster
from sparsax.pallas.hopper import (
    COL,
    COMPUTE,
    LOG2E,
    MATRIX,
    ROW,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    multiprocessors,
    per_col,
    per_row,
    shared,
    tiled,
    zeros,
)  # fmt: skip
from sparsax.pallas.score_map import scores

LINE = 32  # float32 values in a line of shared memory


def mean_kernel(x: Problem, chunk: int | None, interpret):
    """A function of `([q_ids, kv_ids], q, k, lse)` that returns the mean map, float32.

    lse is from `lse_kernel`. The map is `[P, T', S']`, padded to what tile copies accept; with
    `chunk`, `[P, C, T']`: sums over that many neighbouring keys, for rows padded to row tiles.
    """
    columns, cores = scores.columns_of(x), TensorCores(interpret is not None)
    tile, gain, masked = columns.tile, x.scale * LOG2E, x.q_bounds.partial(columns.tile)
    row_tiles, col_tiles = -(-x.T // ROWS), -(-x.S // tile)
    sharing = x.N // x.P  # heads that are averaged
    per_block = _maps_of_a_block(x.P, row_tiles * col_tiles)
    slot = (ROWS + tile) * x.H * x.dtype.itemsize
    stages = scores.stages(slot, ROWS * tile * 4)

    def kernel(*refs, q_smem, k_smem, ids_smem, out_smem, bars):
        (q_ids, kv_ids), (q, k, lse, out) = scores.split_ids(refs, x.ids)
        ring, wg, item = Ring(bars, stages), lax.axis_index("wg"), lax.axis_index("item")
        group = item // (row_tiles * col_tiles)
        row, col = raster(item - group * (row_tiles * col_tiles), row_tiles, col_tiles)
        steps = jnp.int32(x.B * sharing)
        if x.right is not None:  # a tile above the diagonal is zero
            steps = jnp.where(col * tile < (row + 1) * ROWS, steps, 0)

        def where(nth, step):
            """`(sample, head)`."""
            first = (group * per_block + nth) * sharing
            return step // sharing, first + lax.rem(step, jnp.int32(sharing))

        @copying(wg)
        def copy_tiles():
            def fill(nth, step):
                sample, head = where(nth, step)
                step = nth * steps + step
                slot = ring.slot(step)
                ring.reserve(step)
                for i in range(COMPUTE):
                    rows = pl.ds(row * ROWS + i * WG_ROWS, WG_ROWS)
                    part = q.at[sample, rows, head]
                    plgpu.copy_gmem_to_smem(part, q_smem.at[slot, i], ring.filled.at[slot])
                scores.copy_keys(
                    k, kv_ids, sample, head // (x.N // x.K), pl.ds(col * tile, tile),
                    k_smem.at[slot], ids_smem.at[slot] if x.ids else None, ring.filled.at[slot],
                )  # fmt: skip

            def fill_map(nth, _):
                lax.fori_loop(0, steps, lambda step, _: fill(nth, step), None)

            lax.fori_loop(0, per_block, fill_map, None)
            ring.drain(per_block * steps)

        @pl.when(wg < COMPUTE)
        def sum_up():
            plgpu.set_max_registers(232, action="increase")
            first_row = row * ROWS + wg * WG_ROWS
            rows, nothing = pl.ds(first_row, WG_ROWS), zeros((WG_ROWS, tile), MATRIX)

            def total(nth):
                begun = nth * steps

                def operands(step):
                    slot = ring.slot(begun + step)
                    return q_smem.at[slot, wg], k_smem.at[slot].transpose((1, 0))

                def prepare(step, _):
                    sample, head = where(nth, step)
                    read = lambda ref: plgpu.load(ref, layout=ROW, optimized=False)
                    below = read(lse.at[sample, head, rows])
                    own: Any = read(q_ids.at[sample, rows]) if x.ids else None

                    def finish(get):
                        s = get() * gain - per_row(below, nothing.shape)
                        if not x.ids:
                            return s
                        others = plgpu.load(ids_smem.at[ring.slot(begun + step)], layout=COL)
                        same = per_row(own, s.shape) == per_col(others, s.shape)
                        return jnp.where(same, s, -jnp.inf)

                    return finish

                use = lambda s, total: total + jnp.exp2(s)
                return scores.each_tile(cores, ring, begun, steps, operands, prepare, use, nothing)

            def one_map(nth, _):
                p = lax.cond(steps > 0, total, lambda _: nothing, nth)
                p = p * (1.0 / (x.B * sharing))
                if masked:  # the same pairs for every sample and head; ids are done with
                    p = jnp.where(scores.kept(columns, first_row, col), p, 0.0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if chunk is None:
                    out_smem.at[wg][...] = p
                    place = out.at[group * per_block + nth, rows, pl.ds(col * tile, tile)]
                else:
                    for i in range(tile // chunk):
                        part = p[:, i * chunk : (i + 1) * chunk]
                        out_smem.at[wg, i][...] = part.sum(axis=1)
                    chunks = pl.ds(col * (tile // chunk), tile // chunk)
                    place = out.at[group * per_block + nth, chunks, rows]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], place)

            lax.fori_loop(0, per_block, one_map, None)
            plgpu.wait_smem_to_gmem(0)

    if chunk is None:
        padded = -(-x.T // 8) * 8, -(-x.S // LINE) * LINE
        out = jax.ShapeDtypeStruct((x.P, *padded), jnp.float32)
        out_smem = tiled((COMPUTE, WG_ROWS, tile), jnp.float32, LINE, 4 * LINE)
    else:
        chunks = tile // chunk
        out = jax.ShapeDtypeStruct((x.P, col_tiles * chunks, row_tiles * ROWS), jnp.float32)
        out_smem = plgpu.SMEM((COMPUTE, chunks, WG_ROWS), jnp.float32)
    return launch(
        kernel,
        "score_map_mean",
        row_tiles * col_tiles * (x.P // per_block),
        (out,),
        interpret,
        q_smem=shared((stages, COMPUTE, WG_ROWS, x.H), x.dtype),
        k_smem=shared((stages, tile, x.H), x.dtype),
        ids_smem=plgpu.SMEM((stages, tile), jnp.int32) if x.ids else None,
        out_smem=out_smem,
        bars=Ring.barriers(stages, COMPUTE + (2 if x.ids else 1)),
    )


def _maps_of_a_block(maps: int, tiles: int) -> int:
    """Maps whose tile one thread block does in turn, loads of the next behind the current one.

    As many as leave every multiprocessor several thread blocks, which evens their ends out.
    """
    enough = (n for n in range(maps, 0, -1) if maps % n == 0)
    return next((n for n in enough if tiles * (maps // n) >= 4 * multiprocessors()), 1)
