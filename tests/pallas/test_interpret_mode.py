"""What the other tests rely on: interpret mode sees races, however its callbacks are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.mark.parametrize("waits", [False, True])
def test_a_race_is_found_where_no_barrier_is_waited_for(waits):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # no public way

    x = jnp.arange(128, dtype=jnp.float32)
    with pallas.interpreted(detect_races=True):
        got = jax.block_until_ready(jax.jit(lambda x: handed_over(x, waits))(x))
    assert interpret_pallas_call.get_races().races_found is not waits
    if waits:
        np.testing.assert_array_equal(got, x)
