"""The routed feed-forward layer on the kernels: interpreted, lowered, and on the GPU."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas
from sparsax.pallas.grouped_matmul import product
from tests.ffn_cases import CASES, Case, run, value_and_gradients
from tests.helpers import TOLERANCES, assert_near, launched
from tests.pallas.cases import cells


def for_kernels(c: Case, grow: int) -> Case:
    """The case with features that the kernels take, in 16 bits, and more tokens."""
    activation = "gelu" if c.activation == "gelu_exact" else c.activation
    dtype = "bfloat16" if c.dtype == "float32" else c.dtype
    tokens = tuple(grow * m for m in c.M)
    size = {"D": 64 * grow, "E": 64 * grow}
    return dataclasses.replace(c, M=tokens, activation=activation, dtype=dtype, **size)


def check(c, **options):
    y, got = value_and_gradients(c, c.dtype, "pallas", **options)
    want_y, want = value_and_gradients(c, "float32", "reference")
    tolerance = TOLERANCES[c.dtype]
    assert y.dtype == jnp.dtype(c.dtype)
    assert_near(y, want_y, tolerance.output, "y")
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want)]
    for name, one, other in zip(names, *map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, tolerance.gradient, name)


INTERPRETED = (
    Case(name="lora_masked", M=(40,), D=64, E=64, G=3, R=3, masked=True, dtype="bfloat16"),
    Case(name="gated_lora", M=(30,), D=64, E=256, G=2, k=1, R=4, gated=True, activation="silu",
         dtype="float16"),
)  # fmt: skip


@pytest.mark.usefixtures("fresh")
@pytest.mark.slow
@pytest.mark.parametrize("c", INTERPRETED, ids=lambda c: c.name)
def test_values_and_gradients_match_the_reference(c, monkeypatch):
    monkeypatch.setattr(product, "multiprocessors", lambda: 2)  # each walks over several tiles
    with pallas.interpreted():
        check(c)


SPT = Case(name="spt", D=64, E=64, G=3, R=3, gated=True, masked=True, coefficient="spt",
           activation="silu", dtype="bfloat16")  # fmt: skip
PLAIN = Case(name="plain", D=64, E=64, G=3, bias=False, dtype="float16")


@pytest.mark.usefixtures("fresh")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("c", "frozen"), [(c, c.R > 0) for c in (*INTERPRETED, SPT, PLAIN)] + [(INTERPRETED[1], False)]
)
def test_kept_products_give_the_same_gradients(c, frozen):
    with pallas.interpreted():
        (y, got), (want_y, want) = (
            value_and_gradients(c, c.dtype, "pallas", frozen=frozen, recompute=recompute)
            for recompute in (False, True)
        )
    # The hidden units of the forward pass alone are of sums that were not rounded to be kept.
    assert_near(y, want_y, TOLERANCES[c.dtype].output, "y")
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("grow", [1, 4])
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_values_and_gradients_match_the_reference_on_the_gpu(c, grow):
    c = for_kernels(c, grow)
    with jax.default_matmul_precision("highest"):
        check(c)
        check(c, recompute=False)
    one, two = (value_and_gradients(c, c.dtype, "pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def lowered(c, implementation="pallas", **options):
    *arguments, _ = c.inputs()

    def loss(*a):
        y = run(c, *a, implementation=implementation, **options)
        return (y.astype(jnp.float32) ** 2).sum()

    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arguments)
        return step.lower(lowering_platforms=("cuda",)).as_text()


MATRIX = list(itertools.product((False, True), (0, 16), (False, True)))


def kept(gated, rank, frozen):
    """Every two of them, with the fewest products and the most; the dtype goes with `gated`."""
    return (gated + (rank > 0) + frozen) % 2 == 0


@pytest.mark.parametrize(("gated", "rank", "frozen"), cells(MATRIX, kept))
def test_every_kind_of_layer_lowers_and_computes_what_is_asked_for(gated, rank, frozen):
    c = Case(name="lower", M=(3, 50), D=192, E=128, R=rank, gated=gated, activation="silu",
             dtype="float16" if gated else "bfloat16")  # fmt: skip
    parts = 2 if gated else 1
    # Hidden units, y; z, dh, the gradient between them, dx; the gradients of the matrices; of each
    # LoRA, the way into its columns and the gradient, once forward for the second matrix as well.
    count = 2 + parts + 3 + (0 if frozen else parts + 1) + (3 + 2 * parts if rank else 0)
    assert launched(lowered(c, frozen=frozen)) == count


@pytest.mark.parametrize(
    ("options", "fewer"),
    [({}, 1), ({"gated": True, "R": 16}, 1), ({"gated": True, "R": 16, "coefficient": "spt"}, 2)],
    ids=["plain", "gated_lora", "gated_lora_spt"],
)
def test_kept_products_are_not_launched_again(options, fewer):
    # The hidden units have one kernel for both parts; what is kept, one for each, but just once.
    c = Case(name="kept", D=64, E=128, activation="silu", dtype="bfloat16", **options)
    again, kept = (launched(lowered(c, recompute=recompute)) for recompute in (True, False))
    assert again - kept == fewer


SIZES = [("relu", 64, 64), ("gelu", 320, 64), ("gelu", 64, 320), ("relu", 1024, 256)]


@pytest.mark.parametrize(("activation", "features", "unit"), SIZES)
def test_sizes_and_activations_lower(activation, features, unit):
    c = Case(name="sizes", D=features, E=unit, G=2, activation=activation, dtype="bfloat16")
    assert launched(lowered(c)) == 8


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", True), ("float32", False)])
def test_none_is_the_kernels_where_they_can_run(dtype, kernels):
    c = Case(name="none", D=64, E=64, dtype=dtype)
    assert ("mosaic_gpu" in lowered(c, implementation=None)) == kernels


@pytest.mark.parametrize("recompute", [True, False])
def test_the_hidden_units_are_activated_where_they_are_computed(recompute):
    c = Case(name="forward", D=64, E=64, R=8, gated=True, activation="silu", dtype="bfloat16")
    *arguments, _ = c.inputs()
    with pallas.lowering():
        options = {"implementation": "pallas", "recompute": recompute}
        traced = jax.jit(lambda *a: run(c, *a, **options)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 3  # hidden units, y, LoRA's part of y
    assert not any(name in text for name in ("stablehlo.logistic", "stablehlo.exponential"))


def sharded(*arguments):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "tokens")
    split, whole = jax.sharding.PartitionSpec("tokens"), jax.sharding.PartitionSpec()
    call = lambda *a: run(WITHIN, *a, implementation="pallas")
    specs = (split, whole, whole, split)
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=split)(*arguments)


def in_a_scan_with_remat(x, weights, lora, p):
    layer = jax.checkpoint(lambda x, p: (x + run(WITHIN, x, weights, lora, p), None))
    return jax.lax.scan(layer, x, jnp.stack([p, p]))[0]


WITHIN = Case(name="within", D=64, E=64, G=2, R=2, gated=True, activation="silu", dtype="bfloat16")


@pytest.mark.parametrize("call", [sharded, in_a_scan_with_remat])
def test_gradients_lower_within_transformations(call):
    *arguments, _ = WITHIN.inputs()
    loss = lambda *a: call(*a).astype(jnp.float32).sum()
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arguments)
        assert "mosaic_gpu" in step.lower(lowering_platforms=("cuda",)).as_text()


REFUSED = {
    "float32": ({"dtype": "float32"}, "takes rows and matrices in one of .* got float32"),
    "features": ({"D": 96}, "takes features D and E in multiples of 64; got D=96 and E=64"),
    "units": ({"E": 32}, "takes features D and E in multiples of 64; got D=64 and E=32"),
    "activation": ({"activation": "gelu_exact"}, "takes activation in .* got 'gelu_exact'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_is_refused(name):
    changes, message = REFUSED[name]
    c = Case(**{"name": "refused", "D": 64, "E": 64, "dtype": "bfloat16"} | changes)
    *arguments, _ = c.inputs()
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message):
        run(c, *arguments, implementation="pallas")
