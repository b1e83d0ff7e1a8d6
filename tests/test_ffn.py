import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import route_top_k, routed_ffn, split_ffn
from sparsax.linear import ACTIVATIONS
from tests.ffn_cases import CASES, Case, chosen, run, value_and_gradients
from tests.helpers import TOLERANCES, assert_near


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_values_and_gradients_match_the_float32_reference(c):
    (y, got), (want_y, want) = (
        value_and_gradients(c, *how) for how in ((c.dtype, "xla"), ("float32", "reference"))
    )
    tolerance = TOLERANCES[c.dtype]
    assert y.dtype == jnp.dtype(c.dtype)
    assert_near(y, want_y, tolerance.output, "y")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want)]
    assert all(float(abs(leaf).max()) > 0 for leaf in jax.tree.leaves(want)), names
    for name, one, other in zip(names, *map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, tolerance.gradient, name)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(got[:-1])}
    assert dtypes == {jnp.dtype(c.dtype)}


def dense_ffn(c, x, weights):
    dense = weights.to_dense()
    product = lambda n: x @ dense[f"w_{n}"] + (0 if dense[f"b_{n}"] is None else dense[f"b_{n}"])
    act = ACTIVATIONS[c.activation]
    h = act(product("gate")) * product("up") if c.gated else act(product("up"))
    return h @ dense["w_down"] + (0 if dense["b_down"] is None else dense["b_down"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@chosen("no_bias", "gated_bias", "many_blocks")
def test_all_blocks_together_are_the_dense_layer(c, implementation):
    x, weights, _, probabilities, dy = c.inputs()
    c = dataclasses.replace(c, k=c.G)

    def loss(x, weights, route):
        y = run(c, x, weights, None, probabilities, implementation=implementation)
        return ((y if route else dense_ffn(c, x, weights)) * dy).sum(), y

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    ((_, y), got), ((_, dense_y), want) = (both(x, weights, route) for route in (True, False))
    assert_near(y, dense_y, 1e-6, "y")
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-5, "gradient")


def test_split_blocks_are_the_layer_in_any_order_of_its_units():
    w_up, w_gate = jax.random.normal(jax.random.key(0), (2, 12, 24))
    w_down = jax.random.normal(jax.random.key(1), (24, 12))
    b_up, b_gate = jax.random.normal(jax.random.key(2), (2, 24))
    x = jax.random.normal(jax.random.key(3), (5, 12))
    want = (jax.nn.silu(x @ w_gate + b_gate) * (x @ w_up + b_up)) @ w_down
    shuffled = jax.random.permutation(jax.random.key(4), jnp.arange(24) % 4)
    plan = route_top_k(jnp.full((5, 4), 0.5), 4)
    run_ = jax.jit(lambda *a: routed_ffn(*a, activation="silu"))
    for assignment in (None, shuffled, np.asarray(shuffled)):
        weights = split_ffn(
            w_up, w_down, 4, b_up=b_up, w_gate=w_gate, b_gate=b_gate, assignment=assignment
        )
        assert_near(run_(x, weights, plan), want, 1e-5, "y")
    np.testing.assert_array_equal(weights.w_up[2], w_up[:, shuffled == 2])
    np.testing.assert_array_equal(weights.b_gate[1], b_gate[shuffled == 1])
    np.testing.assert_array_equal(weights.w_down[3], w_down[shuffled == 3])


@chosen("masked_batch_lora", "spt_lora_masked")
def test_padded_tokens_give_zeros_and_reach_nothing(c):
    x, weights, lora, probabilities, dy = c.inputs()
    keep = c.mask()[..., None]

    @jax.jit
    def both(x, dy):
        y, pull = jax.vjp(lambda *a: run(c, *a), x, weights, lora, probabilities)
        return y, pull(dy)

    y, got = both(jnp.where(keep, x, jnp.nan), jnp.where(keep, dy, jnp.nan))
    want_y, want = both(x, dy)
    assert not np.asarray(y)[~np.asarray(c.mask())].any()
    jax.tree.map(np.testing.assert_array_equal, (y, got), (want_y, want))
    assert not np.asarray(got[0])[~np.asarray(c.mask())].any()


@chosen("bf16_gated_lora", "masked_batch_lora")
def test_two_runs_give_the_same_bits(c):
    one, two = (value_and_gradients(c, c.dtype, "xla") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@chosen("lora_gated")
def test_vmap_over_batches_and_over_layers(c):
    inputs = [c.inputs(seed)[:4] for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    got = jax.jit(jax.vmap(lambda *a: run(c, *a)))(*stacked)
    whole = jax.jit(lambda *a: run(c, *a))
    for one, arguments in zip(got, inputs, strict=True):
        assert_near(one, whole(*arguments), 1e-6, "layers")
    x, weights, lora, p = inputs[0]
    x, p = jnp.stack([x, -x]), jnp.stack([p, 1 - p])
    got = jax.jit(jax.vmap(lambda x, p: run(c, x, weights, lora, p)))(x, p)
    assert_near(got, whole(x, weights, lora, p), 1e-6, "batches")


@chosen("gated_bias", "masked_batch_lora")
def test_gradient_through_a_scan_over_rematerialised_layers(c):
    layers = [c.inputs(seed)[1:3] for seed in range(3)]
    routers = jax.random.normal(jax.random.key(0), (3, c.D, c.G))
    stacked = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), routers)
    x = c.inputs()[0]

    def layer(x, weights, lora, router, implementation):
        p = jax.nn.sigmoid(x @ router)
        return x + run(c, x, weights, lora, p, implementation=implementation)

    def scanned(x, stacked):
        step = lambda x, now: (layer(x, *now[0], now[1], "xla"), None)
        return (jax.lax.scan(jax.checkpoint(step), x, stacked)[0] ** 2).mean()

    def unrolled(x, stacked):
        for i in range(3):
            (weights, lora), router = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            x = layer(x, weights, lora, router, "reference")
        return (x**2).mean()

    got, want = (jax.jit(jax.grad(f, (0, 1)))(x, stacked) for f in (scanned, unrolled))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-4, "gradient")


@chosen("spt_gated_lora")
def test_shard_map_over_tokens_gives_every_device_its_own_plan(c):
    x, weights, lora, probabilities, dy = c.inputs()
    mesh = Mesh(np.array(jax.devices()[:4]), "tokens")
    sharded = jax.shard_map(
        lambda *a: run(c, *a), mesh=mesh, out_specs=Spec("tokens"),
        in_specs=(Spec("tokens"), Spec(), Spec(), Spec("tokens")),
    )  # fmt: skip
    whole = lambda *a: run(c, *a)
    got, want = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) * dy).sum(), (0, 1, 2, 3)))(
            x, weights, lora, probabilities
        )
        for f in (sharded, whole)
    )
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-5, "gradient")


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_hidden_units():
    c = Case(name="memory", M=(256,), D=8, E=64, G=4, k=2)
    x, weights, _, probabilities, _ = c.inputs()
    _, pull = jax.vjp(lambda x, p: run(c, x, weights, None, p), x, probabilities)
    mine = [leaf for leaf in jax.tree.leaves(pull) if 256 in leaf.shape or leaf.size % 512 == 0]
    weights_ = {leaf.shape for leaf in jax.tree.leaves(weights)}
    assert max(leaf.size for leaf in mine if leaf.shape not in weights_) <= x.size


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_get_no_gradient_and_cost_none(frozen):
    c = Case(name="frozen", M=(64,), D=20, E=12, G=4, R=3)
    *arguments, _ = c.inputs()
    step = jax.jit(jax.grad(lambda *a: run(c, *a, frozen=frozen).sum(), (0, 1, 2, 3)))
    dx, dweights, *rest = step(*arguments)
    assert frozen != any(float(abs(leaf).max()) for leaf in jax.tree.leaves(dweights))
    assert all(float(abs(leaf).max()) > 0 for leaf in jax.tree.leaves((dx, rest)))
    # The gradient of a weight is a sum of products of its shape.
    made = product_shapes(jax.make_jaxpr(step)(*arguments).jaxpr)
    assert {(3, 12), (12, 3), (20, 3), (3, 20)} <= made
    assert frozen == made.isdisjoint({(20, 12), (12, 20)})


def product_shapes(jaxpr):
    """Shapes of everything that a `dot_general` makes, anywhere inside."""
    found = {e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"}
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return found.union(*map(product_shapes, inner))
