"""Routed feed-forward layers that keep their products for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from tests.ffn_cases import CASES, Case, case, chosen, run
from tests.helpers import TOLERANCES, assert_near


def in_two_programs(c, **options):
    """y and the gradients: in one, XLA would merge what the passes both compute, kept or not."""
    *arguments, dy = c.inputs()
    y, pull = jax.jit(lambda *a: jax.vjp(lambda *a: run(c, *a, **options), *a))(*arguments)
    return y, jax.jit(lambda pull, dy: pull(dy))(pull, dy)


def assert_alike(got, want, c):
    """The same bits, but where the sums with LoRA lose some of theirs to be kept."""
    rounded = c.R and c.dtype != "float32" and c.coefficient != "spt"
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        if rounded:
            assert_near(one, other, TOLERANCES[c.dtype].gradient, c.name)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_values_and_gradients_are_those_of_the_layer_that_computes_again(c):
    kept, again = (in_two_programs(c, recompute=recompute) for recompute in (False, True))
    assert_alike(kept, again, c)


@chosen("lora_gated", "masked_batch_lora", "spt_gated_lora", "bf16_gated_lora")
def test_so_are_those_of_frozen_layers(c):
    kept, again = (in_two_programs(c, frozen=True, recompute=r) for r in (False, True))
    assert_alike(kept, again, c)
    assert not any(abs(leaf).max() for leaf in jax.tree.leaves(kept[1][1]))


def over_layers(c, stacked, recompute):
    """`vmap` over layers, each with its own tokens."""
    return jax.vmap(lambda *a: run(c, *a, recompute=recompute))(*stacked)


def scanned(c, stacked, recompute):
    """A scan over rematerialised layers, of the first one's tokens."""
    x, *layers = stacked
    step = lambda x, layer: (x + run(c, x, *layer, recompute=recompute), None)
    return jax.lax.scan(jax.checkpoint(step), x[0], tuple(layers))[0]


def sharded(c, stacked, recompute):
    """`shard_map` over the tokens of the first layer."""
    mesh = Mesh(np.array(jax.devices()[:4]), "tokens")
    tokens, whole = Spec("tokens"), Spec()
    layer = jax.shard_map(
        lambda *a: run(c, *a, recompute=recompute), mesh=mesh, out_specs=tokens,
        in_specs=(tokens, whole, whole, tokens),
    )  # fmt: skip
    return layer(*jax.tree.map(lambda leaf: leaf[0], stacked))


TRANSFORMED = [
    (over_layers, "lora_gated"), (over_layers, "spt_lora_masked"), (scanned, "masked_batch_lora"),
    (scanned, "spt_gated_lora"), (sharded, "own_coefficients"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name"), TRANSFORMED)
def test_gradients_are_alike_within_transformations(call, name):
    c = case(name)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(c.inputs(seed)[:4] for seed in (0, 1)))
    gradient = lambda recompute: jax.jit(
        jax.grad(lambda stacked: (call(c, stacked, recompute) ** 2).sum())
    )
    got, want = (gradient(recompute)(stacked) for recompute in (False, True))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-6, "gradient")


def large_products(jaxpr, c):
    """How many products have both D and E, anywhere inside: LoRA's have but one of them."""
    shapes = lambda e: [x.aval.shape for x in (*e.invars, *e.outvars)]
    large = lambda e: {c.D, c.E} <= {n for shape in shapes(e) for n in shape}
    own = sum(e.primitive.name == "dot_general" and large(e) for e in jaxpr.eqns)
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return own + sum(large_products(x, c) for x in inner)


@pytest.mark.parametrize("coefficient", ["straight_through", "spt"])
@pytest.mark.parametrize(
    ("options", "frozen", "again", "kept"),
    [({}, False, 7, 6), ({"R": 3}, True, 5, 4), ({"gated": True}, False, 11, 9),
     ({"gated": True, "R": 3}, True, 8, 6)],
)  # fmt: skip
def test_both_passes_do_fewer_products(options, frozen, again, kept, coefficient):
    # So few tokens that a product is one of tiles, and sizes that nothing else has.
    c = Case(name="count", M=(9,), D=20, E=12, bias=False, coefficient=coefficient, **options)
    *arguments, _ = c.inputs()
    asked = (0, 2, 3) if frozen else (0, 1, 2, 3)
    for recompute, count in ((True, again), (False, kept)):
        loss = lambda *a, recompute=recompute: run(c, *a, frozen=frozen, recompute=recompute).sum()
        step = jax.make_jaxpr(jax.grad(loss, asked))(*arguments)
        assert large_products(step.jaxpr, c) == count


@chosen("plain", "gated_bias", "bf16_gated_lora", "spt_gated_lora")
def test_the_products_are_all_that_is_kept_beside(c):
    *arguments, _ = c.inputs()
    sizes = {}
    for recompute in (True, False):
        _, pull = jax.vjp(lambda *a, r=recompute: run(c, *a, recompute=r), *arguments)
        sizes[recompute] = [(x.shape, x.dtype) for x in jax.tree.leaves(pull)]
    hidden = ((40 * c.k, c.E), jnp.dtype(c.dtype))
    parts = 2 if c.gated else 1
    assert hidden not in sizes[True]
    assert sorted(map(str, sizes[False])) == sorted(map(str, [*sizes[True], *[hidden] * parts]))
