"""The fused kernel of tiled factors: interpreted against the float32 reference, and lowered."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import TiledFactors, pallas, tsvd_matmul
from tests.helpers import TOLERANCES, assert_near
from tests.test_linear import Case, multiply

CASES = (
    Case(name="plain", M=(128,), D=192, F=128, tile=64, rank=32, dtype="bfloat16"),
    Case(name="ragged_gelu", M=(3, 67), D=300, F=200, tile=128, rank=64, dtype="float16",
         activation="gelu"),
    Case(name="tall_relu", M=(9,), D=256, F=64, tile=(256, 64), rank=32, dtype="bfloat16",
         activation="relu", bias=False),
    Case(name="deep", M=(64,), D=1024, F=64, tile=(512, 64), rank=32, dtype="bfloat16"),
    Case(name="wide_silu", M=(200,), D=64, F=512, tile=(64, 256), rank=96, dtype="bfloat16",
         activation="silu"),
)  # fmt: skip


def value_and_gradients(c, implementation, dtype):
    """`y` and the gradients of x, factors and bias under jit, from inputs cast to `dtype`."""
    *arguments, dy = jax.tree.map(lambda leaf: leaf.astype(dtype), c.inputs())

    @jax.jit
    def run(arguments, dy):
        call = lambda *a: tsvd_matmul(*a, c.activation, implementation=implementation)
        y, pull = jax.vjp(call, *arguments)
        return y, pull(dy)

    return run(arguments, dy)


def check(c):
    got = value_and_gradients(c, "pallas", c.dtype)
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(c, "reference", "float32")
    tolerance = TOLERANCES[c.dtype]
    assert got[0].dtype == jnp.dtype(c.dtype)
    assert_near(got[0], want[0], tolerance.output, "y")
    for one, other in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        assert_near(one, other, tolerance.gradient, "gradient")


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        check(c)


@pytest.mark.gpu
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_values_and_gradients_match_the_reference_on_the_gpu(c):
    check(c)
    one, two = (value_and_gradients(c, "pallas", c.dtype) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


FITS = list(itertools.product((64, 128, 192, 256, 512), (32, 64, 96, 128), ("bfloat16", "float16")))


def lower(size, rank, dtype, activation=None):
    u = jax.ShapeDtypeStruct((3, size, 5, rank), dtype)
    v = jax.ShapeDtypeStruct((5, 3, rank, size), dtype)
    factors = TiledFactors(u, v, pad_in=0, pad_out=0)
    x, bias = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((200, 3 * size), (5 * size,)))

    def loss(*a):
        y = tsvd_matmul(*a, activation, implementation="pallas")
        return (y.astype(jnp.float32) ** 2).sum()

    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, factors, bias)
        return step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("size", "rank", "dtype"), FITS)
def test_the_kernel_lowers_forward_and_for_dx(size, rank, dtype):
    assert lower(size, rank, dtype).count("stablehlo.custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_lower_in_the_epilogue(activation):
    x, factors, bias, _ = CASES[0].inputs()
    with pallas.lowering():
        run = jax.jit(lambda *a: tsvd_matmul(*a, activation, implementation="pallas"))
        text = run.trace(x, factors, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert not any(
        name in text for name in ("stablehlo.tanh", "stablehlo.logistic", "stablehlo.maximum")
    )


REFUSED = {
    "float32": ({"dtype": "float32"}, "takes x and factors in one of .* got float32"),
    "rank": ({"rank": 16}, r"takes ranks \(32, 64, 96, 128\); got 16, see .*pad_rank\(32\)"),
    "tile": ({"tile": 48}, "takes tiles in multiples of 64 .* got 48 x 48"),
    "activation": ({"activation": "gelu_exact"}, "takes activation .* got 'gelu_exact'"),
    "common": ({"side": "right"}, "has no kernel for common factors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_do_is_refused(name):
    changes, message = REFUSED[name]
    c = dataclasses.replace(CASES[0], **changes)
    x, factors, bias, _ = c.inputs()
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message):
        multiply(x, factors, bias, c.activation, implementation="pallas")


def test_a_machine_without_hopper_is_refused():
    x, factors, *_ = CASES[0].inputs()
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs this"):
        tsvd_matmul(x, factors, implementation="pallas")
