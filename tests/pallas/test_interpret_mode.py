"""What the other tests rely on: interpret mode sees races, however its callbacks are called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax import pallas


def handed_over(x, waits: bool):
    """What one warpgroup wrote to shared memory, as another reads it, with a barrier or without."""

    def kernel(x_ref, out_ref, smem, written):
        wg = lax.axis_index("wg")

        @pl.when(wg == 0)
        def write():
            smem[...] = x_ref[...]
            plgpu.barrier_arrive(written)

        @pl.when(wg == 1)
        def read():
            if waits:
                plgpu.barrier_wait(written)
            out_ref[...] = smem[...]

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()], num_threads=2,
        thread_name="wg", interpret=pallas.interpret(),
    )(x)  # fmt: skip


def test_a_race_is_found_in_the_kernel_where_no_barrier_is_waited_for(races):
    x = jnp.arange(128, dtype=jnp.float32)
    for waits in (False, True):
        with pallas.interpreted(detect_races=True):
            got = jax.block_until_ready(jax.jit(functools.partial(handed_over, waits=waits))(x))
    np.testing.assert_array_equal(got, x)
    assert [kernel.races_found for kernel in races] == [True, False]
