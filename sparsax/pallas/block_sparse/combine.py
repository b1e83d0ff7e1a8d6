"""The results of split rows: pieces joined in order, so that two runs give the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.schedule import Schedule
from sparsax.pallas.block_sparse.segments import split
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import (
    LOWEST,
    MATRIX,
    ROW,
    full,
    multiprocessors,
    per_row,
    shared,
    zeros,
)  # fmt: skip

STRIP = 64  # rows joined by one warpgroup, as many as its registers hold
AT_ONCE = 4  # thread blocks for each multiprocessor; with more to join, each of them joins more


def combine(schedule: Schedule, samples: int, dealt, parts, targets, starts, lse, interpret) -> Any:
    """Targets `[B, S, K, H]` with the row tiles of split rows filled in from their pieces.

    Each target is a list of arrays that begin at the positions `starts`. `samples` is 1 where all
    share their lists. `dealt` is what `deal` wrote; `parts` are from the kernel that did the rows:
    sums `[part and copy, target, 128, H]`, which are added; or the outputs of softmax attention
    `[part and copy, 1, 128, H]` and their log-sum-exps `[part and copy, 128]` in units of log 2,
    which are averaged by weight: then `lse [B, K, S']` is that of the rows, infinite where there
    is nothing to average, else None. It returns the targets and lse.
    """
    (_, _, heads, features), dtype = targets[0][0].shape, targets[0][0].dtype
    owners = schedule.owners // samples  # of one sample
    sharing, gradients = heads // owners, parts[0].shape[1]
    shape, weighted = (STRIP, features), len(parts) > 1
    strips = ROWS // STRIP
    blocks = min(schedule.extra * schedule.copies * strips, AT_ONCE * multiprocessors())

    def kernel(table, splits, *refs, smem, lse_smem):
        (sums, *lses), refs = refs[: len(parts)], list(refs[len(parts) :])
        *targets, whole = split(refs, *(starts for _ in range(gradients)))

        def join(place, strip):
            nth, copy = place // schedule.copies, lax.rem(place, jnp.int32(schedule.copies))
            row, more = splits[0, nth], splits[1, nth]
            strip_rows = pl.ds(strip * STRIP, STRIP)
            first = lax.rem(row, jnp.int32(schedule.tiles)) * ROWS + strip * STRIP
            owner = row // schedule.tiles
            sample = copy // sharing + owner // owners
            head = lax.rem(owner, jnp.int32(owners)) * sharing + lax.rem(copy, jnp.int32(sharing))

            def part(n):  # the first piece, then the added ones
                return jnp.where(n == 0, schedule.extra + nth, nth + n - 1) * schedule.copies + copy

            def piece(n, i):
                return plgpu.load(sums.at[part(n), i, strip_rows], layout=MATRIX, optimized=False)

            def write(i, rows):
                smem[i] = rows
                plgpu.commit_smem()
                # A copy of a whole tile stops at the end of the array by itself.
                targets[i].at(first, lambda ref, first: plgpu.copy_smem_to_gmem(
                    smem.at[i], ref.at[sample, pl.ds(first, STRIP), head]
                ))  # fmt: skip

            def averaged():
                def add(n, carry):
                    acc, top, total = carry
                    lse = plgpu.load(lses[0].at[part(n), strip_rows], layout=ROW, optimized=False)
                    new_top = jnp.maximum(top, lse)
                    decay, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                    acc = acc * per_row(decay, shape) + piece(n, 0) * per_row(weight, shape)
                    return acc, new_top, total * decay + weight

                start = zeros(shape, MATRIX), full((STRIP,), LOWEST, ROW), zeros((STRIP,), ROW)
                acc, top, total = lax.fori_loop(0, more + 1, add, start)
                empty = total == 0.0
                positive = jnp.where(empty, 1.0, total)
                lse_smem[...] = jnp.where(empty, jnp.inf, top + jnp.log2(positive))
                write(0, (acc / per_row(positive, shape)).astype(dtype))
                plgpu.copy_smem_to_gmem(lse_smem, whole[0].at[sample, head, pl.ds(first, STRIP)])

            def added():
                for i in range(gradients):
                    add = lambda n, total, i=i: total + piece(n, i)
                    write(i, lax.fori_loop(1, more + 1, add, piece(0, i)).astype(dtype))

            @pl.when(more > 0)
            def _():
                averaged() if weighted else added()
                plgpu.wait_smem_to_gmem(0)

        def visit(i, _):
            index = lax.axis_index("block") + i * blocks
            join(index // strips, lax.rem(index, jnp.int32(strips)))

        every = table[0] * schedule.copies * strips
        mine = (every - lax.axis_index("block") + (blocks - 1)) // blocks
        lax.fori_loop(0, mine, visit, None)

    scratch: dict[str, Any] = {
        "smem": shared((gradients, STRIP, features), dtype),
        "lse_smem": plgpu.SMEM((STRIP,), jnp.float32) if weighted else None,
    }
    refs = jax.tree.map(jax.new_ref, (targets, [] if lse is None else [lse]))
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="block_sparse_combine",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*dealt, *parts, *jax.tree.leaves(refs))
    targets, rest = jax.tree.map(jax.freeze, refs)
    return targets, rest[0] if rest else None
