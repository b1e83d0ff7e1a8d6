import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsax.linear import ACTIVATIONS
from sparsax.nn import (
    CommonParam,
    TSVDCommonLinear,
    TSVDLinear,
    named_modules,
    replace_modules,
    tsvd,
)
from sparsax.nn.decoder import FeedForward
from sparsax.nn.dense import activated
from tests.helpers import assert_near

D, F = 40, 72


def dense(**options):
    layer = nnx.Linear(D, F, rngs=nnx.Rngs(0), **options)
    if layer.bias is not None:
        layer.bias[...] = jnp.linspace(-1.0, 1.0, F, dtype=layer.bias.dtype)
    return layer


def inputs():
    return jax.random.normal(jax.random.key(1), (2, 5, D))


FORMS = {
    "own": lambda linear: TSVDLinear.from_linear(linear, tile=16, rank=6),
    "own_whole": lambda linear: TSVDLinear.from_linear(linear, ratio=2),
    "right": lambda linear: TSVDCommonLinear.from_linear(linear, tile=8, rank=6),
    "left": lambda linear: TSVDCommonLinear.from_linear(linear, tile=8, rank=6, side="left"),
    "residual": lambda linear: TSVDCommonLinear.from_linear(
        linear, tile=16, rank=6, mode="residual"
    ),
}
BY_FORM = pytest.mark.parametrize("form", FORMS)


@BY_FORM
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_layer_is_the_dense_one_with_its_kernel(form, use_bias):
    layer = FORMS[form](dense(use_bias=use_bias))
    back = layer.to_linear()
    assert isinstance(back, nnx.Linear)
    assert (back.bias is not None) == use_bias
    assert_near(layer(inputs()), back(inputs()), 1e-5, "output")
    again = FORMS[form](back)
    assert_near(again(inputs()), back(inputs()), 1e-5, "back and forth")


def test_the_residual_form_starts_out_unchanged_and_at_full_rank_so_do_the_others():
    want = dense()(inputs())
    assert_near(FORMS["residual"](dense())(inputs()), want, 1e-6, "residual")
    full = TSVDLinear.from_linear(dense(), tile=16, rank=16)
    assert_near(full(inputs()), want, 1e-5, "own")
    full = TSVDCommonLinear.from_linear(dense(), tile=16, rank=16)
    assert_near(full(inputs()), want, 1e-5, "common")


@BY_FORM
@pytest.mark.parametrize(
    ("features", "axis"),
    [((D, (4, 18)), -1), (((5, 8), F), (-2, -1)), (((5, 8), (4, 18)), (-2, -1))],
)  # fmt: skip
def test_general_layers_keep_their_axes(form, features, axis):
    linear = nnx.LinearGeneral(*features, axis=axis, rngs=nnx.Rngs(0))
    layer = FORMS[form](linear)
    shape = (5, 8) if isinstance(features[0], tuple) else (D,)
    x = inputs().reshape(2, 5, *shape)
    back = layer.to_linear()
    assert isinstance(back, nnx.LinearGeneral)
    assert layer(x).shape == linear(x).shape
    assert_near(layer(x), back(x), 1e-5, "output")


@BY_FORM
def test_dtypes_are_those_of_flax(form):
    for param_dtype, dtype in (("float32", None), ("float32", "bfloat16"), ("bfloat16", None)):
        linear = dense(param_dtype=param_dtype, dtype=dtype)
        layer = FORMS[form](linear)
        for x in (inputs(), inputs().astype(jnp.bfloat16)):
            assert layer(x).dtype == linear(x).dtype
        assert all(v.dtype == param_dtype for v in jax.tree.leaves(nnx.state(layer)))


def test_ranks_are_padded_for_the_kernels():
    layer = TSVDLinear.from_linear(dense(), tile=16, rank=6, implementation="pallas")
    assert layer.factors.rank == 16
    want = TSVDLinear.from_linear(dense(), tile=16, rank=6).factors.to_dense()
    assert_near(layer.factors.to_dense(), want, 1e-6, "kernel")


def test_an_activation_is_applied():
    layer = TSVDLinear.from_linear(dense(), tile=16, rank=6)
    fused = TSVDLinear(layer.factors, layer.bias[...], activation="gelu")
    assert_near(fused(inputs()), nnx.gelu(layer(inputs())), 1e-6, "output")
    with pytest.raises(ValueError, match="has no activation; this one has 'gelu'"):
        fused.to_linear()


@BY_FORM
@pytest.mark.parametrize("activation", ["relu", "gelu_exact"])
def test_an_activation_behind_a_layer_is_part_of_its_product_where_kernels_have_it(
    form, activation, monkeypatch
):
    ffn = FeedForward(D, 3 * F, activation=activation, gated=form == "left", rngs=nnx.Rngs(0))
    name = "gate" if form == "left" else "up"
    setattr(ffn, name, FORMS[form](getattr(ffn, name)))
    layer, x = getattr(ffn, name), inputs()
    hidden = ACTIVATIONS[activation](layer(x)) * (ffn.up(x) if form == "left" else 1)
    want, seen = ffn.down(hidden), []
    for product in ("tsvd_matmul", "tsvd_common_matmul"):
        run = getattr(tsvd, product)
        spy = lambda x, factors, bias, activation, run=run, **options: (
            seen.append(activation) or run(x, factors, bias, activation, **options)
        )
        monkeypatch.setattr(tsvd, product, spy)
    assert_near(ffn(x), want, 1e-5, "output")
    assert seen == ["relu" if activation == "relu" and form != "residual" else None]


class Twice(TSVDLinear):
    """Does more than its factors say."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def test_an_activation_comes_after_whatever_a_layer_does():
    own = TSVDLinear(FORMS["own"](dense()).factors, activation="silu")
    assert_near(own.activated(inputs(), "relu"), nnx.relu(own(inputs())), 1e-6, "output")
    twice = Twice(own.factors)
    assert_near(activated(twice, inputs(), "gelu"), nnx.gelu(twice(inputs())), 1e-6, "output")
    exact = TSVDLinear(own.factors.pad_rank(16), implementation="pallas")
    with pytest.raises(NotImplementedError, match="takes x and factors"):  # what it refuses is x
        exact.activated(inputs(), "gelu_exact")


@pytest.mark.usefixtures("unchecked")
def test_unknown_activations_are_refused_alike():
    own = TSVDLinear(FORMS["own"](dense()).factors, activation="silu")
    for layer in (own, FORMS["own"](dense()), FORMS["residual"](dense())):
        with pytest.raises(ValueError, match=r"activation must be one of .*'relu'.*'swish'"):
            layer.activated(inputs(), "swish")
    with pytest.raises(ValueError, match="activation must be one of"):
        activated(dense(), inputs(), None)


@pytest.mark.parametrize("form", ["right", "left", "residual"])
def test_training_moves_the_common_factor_alone(form):
    layer = FORMS[form](dense())
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(layer)))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=CommonParam)
    target = jax.random.normal(jax.random.key(2), (2, 5, F))

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda layer: ((layer(inputs()) - target) ** 2).mean()
        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, CommonParam))(layer)
        optimizer.update(layer, gradient)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(layer))
    assert float(abs(after.pop("common") - before.pop("common")).max()) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, after, before)


@BY_FORM
def test_layers_split_merge_and_scan(form):
    layers = [FORMS[form](nnx.Linear(D, D, rngs=nnx.Rngs(seed))) for seed in range(3)]
    graph, state = nnx.split(layers[0])
    states = [state, *(nnx.state(layer) for layer in layers[1:])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = lambda x, state: (jnp.tanh(nnx.merge(graph, state)(x)), None)
    got, _ = jax.jit(lambda x: jax.lax.scan(step, x, stacked))(inputs())
    want = inputs()
    for layer in layers:
        want = jnp.tanh(layer(want))
    assert_near(got, want, 1e-5, "output")


def test_modules_are_found_and_replaced_wherever_they_are_shared():
    class Model(nnx.Module):
        def __init__(self):
            self.one = dense()
            self.rest = nnx.List([self.one, nnx.Dict(two=dense())])

    model = Model()
    assert list(named_modules(model)) == ["", "one", "rest", "rest.1", "rest.1.two"]
    new = dense()
    replace_modules(model, {"one": new})
    assert model.one is new
    assert model.rest[0] is new
    replace_modules(model, {"rest.1.two": model.one})
    assert model.rest[1]["two"] is new
    with pytest.raises(ValueError, match=r"must name modules within the model; got \['', 'no'\]"):
        replace_modules(model, {"": new, "no": new})


def stacked_layers():
    return nnx.vmap(lambda rngs: nnx.Linear(D, F, rngs=rngs))(nnx.Rngs(0).split(3))


OWN = FORMS["own"](dense()).factors
REFUSED = {
    "no_layer": (lambda: TSVDLinear.from_linear(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), rank=1),
                 "must be nnx.Linear or nnx.LinearGeneral; got LayerNorm"),
    "stacked": (lambda: TSVDLinear.from_linear(stacked_layers(), rank=1),
                r"must be \(40, 72\), of one layer; got \(3, 40, 72\)"),
    "precision": (lambda: TSVDLinear.from_linear(dense(precision="highest"), rank=1),
                  "with the default product; it has {'precision': 'highest'}"),
    "axis": (
        lambda: TSVDLinear.from_linear(
            nnx.LinearGeneral(D, F, axis=1, rngs=nnx.Rngs(0)), rank=1
        ),
        r"must map its last axes .* it has {'axis': \(1,\)}",
    ),
    "mode": (lambda: TSVDCommonLinear.from_linear(dense(), tile=8, rank=1, mode="both"),
             "mode must be one of .* got 'both'"),
    "shapes": (lambda: TSVDLinear(OWN, in_shape=(5, 5)),
               r"must multiply to the factors' \(40, 72\)"),
    "bias": (lambda: TSVDLinear(OWN, jnp.zeros(3)), r"bias have shape \(72,\); got .*\(3,\)"),
    "input": (lambda: TSVDLinear(OWN)(jnp.ones((2, 41))),
              r"must end in shape \(40,\); got \(2, 41\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
