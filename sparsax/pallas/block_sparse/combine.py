"""The sums of split rows: their parts are added in order, so that two runs give the same bits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.schedule import Schedule
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import LANES

STRIP = 64  # rows added by one warpgroup, as many as its registers hold


def combine(schedule: Schedule, samples: int, splits, sums, targets, interpret):
    """`targets [B, S, K, H]` with the row tiles of split rows filled in from the sums of parts.

    `samples` is 1 where all share their lists. `splits [3, E]` and `sums [part and copy, target,
    128, H]` are from `Schedule.table` and the kernel that wrote the parts.
    """
    (_, _, heads, features), dtype = targets[0].shape, targets[0].dtype
    owners = schedule.owners // samples  # of one sample
    sharing = heads // owners

    def kernel(splits, sums, *refs, smem):
        nth, copy = lax.axis_index("split"), lax.axis_index("copy")
        row, first, count = (splits[i, nth] for i in range(3))
        begin = lax.axis_index("strip") * STRIP
        at = pl.ds(lax.rem(row, jnp.int32(schedule.tiles)) * ROWS + begin, STRIP)
        owner = row // schedule.tiles
        sample = copy // sharing + owner // owners
        head = lax.rem(owner, jnp.int32(owners)) * sharing + lax.rem(copy, jnp.int32(sharing))
        layout = plgpu.Layout.WG_STRIDED((STRIP, features), LANES)

        @pl.when(count > 0)
        def _():
            for i, target in enumerate(refs):

                def part(n, i=i):
                    place = (first + n) * schedule.copies + copy
                    source = sums.at[place, i, pl.ds(begin, STRIP)]
                    return plgpu.load(source, layout=layout, optimized=False)

                add = lambda n, total, part=part: total + part(n)
                total = lax.fori_loop(1, count, add, part(0))
                smem[i] = total.astype(dtype)
                plgpu.commit_smem()
                # A copy of a whole tile stops at the end of the array by itself.
                plgpu.copy_smem_to_gmem(smem.at[i], target.at[sample, at, head])
            plgpu.wait_smem_to_gmem(0)

    refs = [jax.new_ref(x) for x in targets]
    grid = {"split": schedule.extra, "copy": schedule.copies, "strip": ROWS // STRIP}
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types={"smem": plgpu.SMEM((len(targets), STRIP, features), dtype)},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name="block_sparse_combine",
        interpret=interpret,
    )(splits, sums, *refs)
    return tuple(jax.freeze(ref) for ref in refs)
