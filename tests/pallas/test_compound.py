"""The kernels of compound attention against the float32 reference: interpreted, and on the GPU."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import compound_attention, pallas
from tests.helpers import assert_near
from tests.pallas.compound_cases import CASES, case

NAMES = ("q_global", "k_global", "v_global")
# Interpreting a case takes seconds to a minute; these few meet every feature between them.
INTERPRETED = (
    "window_causal", "one_token", "vertical_slash", "columns_shared_causal", "rows_causal",
    "longformer_padded_own", "all_selected", "no_part", "everything_per_kv_head",
)  # fmt: skip


def value_and_gradients(c, implementation, dtype):
    """`o` and the gradients of q, k, v and of the projections of global rows, under jit."""
    *qkv, projected, do = c.inputs()
    arrays = [x.astype(dtype) for x in (*qkv, *projected)]

    @jax.jit
    def run(arrays, pattern, do):
        def attend(q, k, v, *projected):
            own = dict(zip(NAMES, projected, strict=False))
            return compound_attention(
                q, k, v, pattern, **own, scale=c.scale, implementation=implementation
            )

        o, pull = jax.vjp(attend, *arrays)
        return o, pull(do)

    return run(arrays, c.pattern(), do.astype(dtype))


def check(c):
    o, gradients = value_and_gradients(c, "pallas", c.dtype)
    want_o, want = value_and_gradients(c, "reference", "float32")
    assert o.dtype == jnp.dtype(c.dtype)
    assert_near(o, want_o, c.tolerance.output, "o")
    for name, got, expected in zip(("dq", "dk", "dv", *NAMES), gradients, want, strict=False):
        assert got.dtype == jnp.dtype(c.dtype)
        assert_near(got, expected, c.tolerance.gradient, name)
    return o, gradients


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_match_the_reference_without_races(name):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # no public way

    with pallas.interpreted(detect_races=True):
        check(case(name))
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.gpu
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_kernels_match_the_reference_and_repeat_their_bits(c):
    first, again = check(c), value_and_gradients(c, "pallas", c.dtype)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
