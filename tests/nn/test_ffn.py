import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from sparsax import routed_ffn
from sparsax.nn import (
    ChoiceBias,
    RoutedFFN,
    RoutedLoRAParam,
    RouterParam,
    TunedParam,
    balance_step,
    call_with_routing,
    set_active,
)
from sparsax.routing import balance_loss, route_top_k
from tests.helpers import assert_near

D, F, G = 12, 32, 4


def dense(gated=False, **options):
    sizes = [(D, F), (F, D), (D, F)][: 3 if gated else 2]
    layers = [nnx.Linear(*size, rngs=nnx.Rngs(i), **options) for i, size in enumerate(sizes)]
    for i, layer in enumerate(layers):
        if layer.bias is not None:
            layer.bias[...] = jax.random.normal(
                jax.random.key(10 + i), layer.bias.shape, layer.bias.dtype
            )
    return layers


def dense_output(layers, x, activation=nnx.gelu):
    up, down, *gate = layers
    return down(activation(gate[0](x)) * up(x) if gate else activation(up(x)))


def inputs(*shape):
    return jax.random.normal(jax.random.key(5), (*(shape or (2, 9)), D))


def routed(gated=False, active=2, **options):
    options = {"lora_rank": 3, "rngs": nnx.Rngs(3)} | options
    return RoutedFFN.from_dense(*dense(gated), num_blocks=G, active=active, **options)


call = nnx.jit(lambda layer, x: layer(x))


def touched(layer):
    """The layer with LoRA that changes something."""
    for i, (_, value) in enumerate(nnx.to_flat_state(nnx.state(layer, RoutedLoRAParam))):
        value[...] = 0.3 * jax.random.normal(jax.random.key(i), value.shape)
    state = nnx.state(layer, RoutedLoRAParam)
    nnx.update(layer, state)
    return layer


@pytest.mark.parametrize(("gated", "calibrated"), [(False, True), (True, False)])
def test_with_all_blocks_and_new_lora_the_layer_is_the_dense_one(gated, calibrated):
    calibration = inputs(200) if calibrated else None
    layer = routed(gated, active=G, calibration=calibration)
    assert_near(call(layer, inputs()), dense_output(dense(gated), inputs()), 1e-5, "y")
    assignment = np.arange(F) % G
    given = routed(gated, active=G, assignment=assignment)
    np.testing.assert_array_equal(given.w_up[1], dense()[0].kernel[:, 1::G])
    assert_near(call(given, inputs()), call(layer, inputs()), 1e-5, "given")


def test_back_to_dense_layers_with_lora_merged():
    plain = {"coefficient": "straight_through"}  # in value 1: every block counts once
    layer = touched(routed(gated=True, active=G, lora_scale=0.7, **plain))
    assert layer.lora.scale == 0.7
    layers = layer.to_dense()
    assert_near(dense_output(layers, inputs()), call(layer, inputs()), 1e-5, "y")
    changed = dense_output(layers, inputs()) - dense_output(dense(gated=True), inputs())
    assert routed().to_dense()[2] is None
    assert float(abs(changed).max()) > 0.1


@pytest.mark.parametrize("coefficient", ["gain", "straight_through", "spt"])
def test_a_call_is_the_functional_one(coefficient):
    layer = touched(routed(active=2, coefficient=coefficient, activation="gelu_exact"))
    if coefficient == "gain":
        layer.router_gain[...] = jnp.linspace(-1.0, 1.0, G)
    mask = jnp.arange(9) < jnp.array([[9], [5]])
    p, plan = layer.route(inputs(), mask=mask)
    want_p = jax.nn.sigmoid(inputs() @ layer.router_kernel[...] + layer.router_bias[...])
    assert_near(p, want_p, 1e-6, "p")
    assert plan.active == 2
    assert int(plan.group_sizes.sum()) == 2 * 14
    gain = {"gain": jnp.linspace(-1.0, 1.0, G)} if coefficient == "gain" else {}
    own = route_top_k(want_p, 2, mask=mask, coefficient=coefficient, **gain)
    assert_near(plan.coefficients, own.coefficients, 1e-6, "coefficients")
    want = routed_ffn(inputs(), layer.blocks, plan, activation="gelu_exact", lora=layer.lora)
    np.testing.assert_array_equal(layer(inputs(), mask=mask), want)
    assert not np.asarray(want)[1, 5:].any()


def test_products_are_kept_for_the_backward_pass_of_a_layer_that_asks_for_it():
    layers = {recompute: touched(routed(recompute=recompute)) for recompute in (True, False)}
    assert [layer.recompute for layer in layers.values()] == [True, False]
    hidden, gradients = (2 * 9 * 2, F // G), {}
    for recompute, layer in layers.items():
        graph, state = nnx.split(layer)
        y, pull = jax.vjp(lambda state, graph=graph: nnx.merge(graph, state)(inputs()), state)
        assert recompute != (hidden in {leaf.shape for leaf in jax.tree.leaves(pull)})
        gradients[recompute] = pull(y)
    for one, other in zip(*map(jax.tree.leaves, gradients.values()), strict=True):
        assert_near(one, other, 1e-6, "gradient")


def test_dtypes_are_those_of_flax():
    for param_dtype, dtype in (("float32", "bfloat16"), ("bfloat16", None)):
        layers = dense(param_dtype=param_dtype, dtype=dtype)
        layer = RoutedFFN.from_dense(*layers, num_blocks=G, active=2, lora_rank=2, rngs=nnx.Rngs(0))
        for x in (inputs(), inputs().astype(jnp.bfloat16)):
            assert layer(x).dtype == dense_output(layers, x).dtype
        assert layer.w_up.dtype == layer.lora_up_a.dtype == param_dtype
        assert layer.router_kernel.dtype == jnp.float32


class Model(nnx.Module):
    """Two routed layers with a residual each."""

    def __init__(self, **options):
        self.layers = nnx.List([routed(**options), routed(gated=True, **options)])

    def __call__(self, x, *, mask=None):
        for layer in self.layers:
            x = x + layer(x, mask=mask)
        return x


def pure(model):
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model)))


def test_training_moves_router_and_lora_alone():
    model = Model()
    before = pure(model)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=TunedParam)
    target = jax.random.normal(jax.random.key(9), (2, 9, D))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y, records = call_with_routing(model, inputs())
            balance = sum(record.balance_loss for record in records.values())
            return ((y - target) ** 2).mean() + 0.01 * balance, records

        state = nnx.DiffState(0, TunedParam)
        (value, records), gradient = nnx.value_and_grad(loss, argnums=state, has_aux=True)(model)
        optimizer.update(model, gradient)
        balance_step(model, records, 0.01)
        return value

    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    after = pure(model)
    for i in (0, 1):
        new, old = after["layers"][i], before["layers"][i]
        for name, value in new.items():
            moved = float(abs(value - old[name]).max()) > 1e-3
            assert moved == name.startswith(("lora", "router", "choice")), name
    assert all(not hasattr(layer, "routing") and not layer.watched for layer in model.layers)


def test_types_select_router_and_lora():
    layer = routed()
    names = lambda kind: {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, kind))}
    lora = {"lora_up_a", "lora_up_b", "lora_down_a", "lora_down_b"}
    router = {"router_kernel", "router_bias", "router_gain"}
    assert names(RouterParam) == router
    assert names(RoutedLoRAParam) == names(nnx.LoRAParam) == lora
    assert names(TunedParam) == router | lora
    assert names(ChoiceBias) == {"choice_bias"}
    assert names(nnx.Param) == router | lora | {"w_up", "w_down", "b_up", "b_down"}


def test_records_say_what_the_routers_did():
    model = Model()
    mask = jnp.arange(9) < jnp.array([[9], [5]])
    want = nnx.jit(lambda m, x: m(x, mask=mask))(model, inputs())
    y, records = nnx.jit(lambda m, x: call_with_routing(m, x, mask=mask))(model, inputs())
    assert_near(y, want, 1e-6, "y")
    assert list(records) == ["layers.0", "layers.1"]
    first = records["layers.0"]
    p, plan = model.layers[0].route(inputs(), mask=mask)
    np.testing.assert_array_equal(first.plan.blocks, plan.blocks)
    loss = balance_loss(p, plan.group_sizes, mask=mask)
    assert_near(first.balance_loss, loss, 1e-6, "balance")


def test_the_choice_bias_steers_and_evens():
    layer = routed()
    layer.router_bias[...] = jnp.array([4.0, 4.0, 0.0, 0.0])
    sizes = lambda: np.asarray(layer.route(inputs())[1].group_sizes)
    assert sizes()[:2].sum() > 30

    @nnx.jit
    def step(layer, x):
        balance_step(layer, call_with_routing(layer, x)[1], 0.02)

    for _ in range(60):
        step(layer, inputs())
    assert sizes()[:2].sum() < 22


def test_active_blocks_are_warmed_down_from_all():
    model = Model(active=G)
    full = call(model, inputs())
    set_active(model, 2)
    assert [layer.active for layer in model.layers] == [2, 2]
    fewer = call(model, inputs())
    assert float(abs(fewer - full).max()) > 1e-2
    set_active(model, G)
    assert_near(call(model, inputs()), full, 1e-6, "again")


def test_calibration_fits_blocks_and_router():
    """Groups of units that answer one direction each are found, and predicted."""
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.arange(F) % G)
    up, down = dense(use_bias=False)
    directions = rng.standard_normal((G, D))
    up.kernel[...] = jnp.asarray(directions[owner].T + 0.2 * rng.standard_normal((D, F)))
    options = {"num_blocks": G, "active": 1, "activation": "relu", "rngs": nnx.Rngs(0)}
    x = jax.random.normal(jax.random.key(1), (500, D))
    fitted = RoutedFFN.from_dense(up, down, calibration=x[:400].reshape(4, 100, D), **options)
    plain = RoutedFFN.from_dense(up, down, **options)
    want = dense_output((up, down), x[400:], nnx.relu)
    error = lambda layer: float(
        jnp.linalg.norm(call(layer, x[400:]) - want) / jnp.linalg.norm(want)
    )
    assert error(fitted) < 0.75 < 0.85 < error(plain)
    warm = RoutedFFN.from_dense(up, down, calibration=x[:400], **options | {"active": G})
    assert error(warm) < 1e-5
    set_active(warm, 1)
    assert error(warm) < 0.75


def test_state_survives_orbax_and_a_merge(tmp_path):
    layer = touched(routed(gated=True, active=1))
    layer.choice_bias[...] = jnp.array([0.0, -2.0, -2.0, -2.0])
    graph, state = nnx.split(layer)
    with ocp.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "state", nnx.to_pure_dict(state))
        keeper.wait_until_finished()
        empty = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(state))
        loaded = keeper.restore(tmp_path / "state", empty)
    fresh = routed(gated=True, active=1, rngs=nnx.Rngs(8))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, loaded)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(call(again, inputs()), call(layer, inputs()))
    assert again.route(inputs())[1].group_sizes.tolist() == [18, 0, 0, 0]


def test_stacked_layers_scan_under_remat():
    layers = [routed(rngs=nnx.Rngs(seed)) for seed in range(3)]
    graph, _ = nnx.split(layers[0])
    states = [nnx.state(layer) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def scanned(stacked, x):
        step = jax.checkpoint(lambda x, state: (x + nnx.merge(graph, state)(x), None))
        return jax.lax.scan(step, x, stacked)[0].sum()

    def unrolled(stacked, x):
        for i in range(3):
            x = x + nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))(x)
        return x.sum()

    got, want = (jax.jit(jax.grad(f))(stacked, inputs()) for f in (scanned, unrolled))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-5, "gradient")


class Forgetful(nnx.Module):
    def __init__(self):
        self.one, self.two = routed(), routed()

    def __call__(self, x):
        return self.one(x)


def other_dtype():
    return dense()[0], nnx.Linear(F, D, dtype="bfloat16", rngs=nnx.Rngs(0))


BLOCKS = routed().blocks
REFUSED = {
    "no_router": (
        lambda: RoutedFFN(BLOCKS, active=2, activation="relu"),
        "give a router .* or rngs for a random one",
    ),
    "router": (
        lambda: RoutedFFN(
            BLOCKS, (jnp.ones((D, 3)), jnp.ones(3)), active=2, activation="relu"
        ),
        r"must be a kernel \(12, 4\) and a bias \(4,\); got \(12, 3\) and \(3,\)",
    ),
    "active": (lambda: routed(active=5)(inputs()), r"k must be within \[1, G=4\]; got 5"),
    "set_active": (
        lambda: set_active(Model(), 5),
        r"active must be within \[1, 4\], the blocks of 'layers.0'; got 5",
    ),
    "no_layer": (
        lambda: call_with_routing(dense()[0], inputs()),
        "the model has no sparsax.nn.RoutedFFN layer; got Linear",
    ),
    "left_out": (
        lambda: call_with_routing(Forgetful(), inputs()),
        r"must call all of its RoutedFFN; it left out \['two'\]",
    ),
    "dtypes": (
        lambda: RoutedFFN.from_dense(
            *other_dtype(), num_blocks=4, active=2, rngs=nnx.Rngs(0)
        ),
        r"must compute in one dtype; got \[None, .*bfloat16",
    ),
    "divides": (
        lambda: RoutedFFN.from_dense(*dense(), num_blocks=3, active=2, rngs=nnx.Rngs(0)),
        "must divide the F=32 hidden units; got 3",
    ),
    "not_dense": (
        lambda: RoutedFFN.from_dense(
            nnx.LayerNorm(3, rngs=nnx.Rngs(0)), dense()[1], num_blocks=4, active=2,
            rngs=nnx.Rngs(0),
        ),
        "must be nnx.Linear or nnx.LinearGeneral; got LayerNorm",
    ),
    "activation": (
        lambda: routed(activation="tanh"),
        "activation must be one of .* got 'tanh'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
