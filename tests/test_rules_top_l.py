"""Attention of whole models to the best keys, and SPT's conversion in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsax
from sparsax import sparsify
from sparsax.nn import (
    DecoderConfig,
    LanguageModel,
    LoRALinear,
    RoutedFFN,
    SparseAttention,
    TopLAttention,
)
from sparsax.rules import LoRA, Routed, TopL
from tests.helpers import assert_near

SIZES = {"vocab_size": 40, "length": 32, "features": 16, "hidden": 64, "num_heads": 2, "layers": 2}
TOKENS = jax.random.randint(jax.random.key(0), (4, 32), 0, 40)
ATTENTION = {"path": r".*\.attention"}
call = nnx.jit(lambda model, tokens: model(tokens))


def model(style="opt", **sizes):
    return LanguageModel(getattr(DecoderConfig, style)(**SIZES | sizes), rngs=nnx.Rngs(0))


def calibrate(model):
    model(TOKENS)


@pytest.mark.parametrize("style", ["opt", "llama"])
def test_keeping_every_key_is_the_dense_model(style):
    dense = model(style, num_kv_heads=1)
    sparse, report = sparsify(dense, [TopL(**ATTENTION, keep=32)], calibrate=calibrate)
    assert_near(call(sparse, TOKENS), call(dense, TOKENS), 1e-5, "logits")
    assert [row.detail for row in report.rows] == ["32 keys by adc"] * 2
    before, after = report.parameters
    assert before == after
    fewer, _ = sparsify(dense, [TopL(**ATTENTION, keep=2)], calibrate=calibrate)
    assert float(abs(call(fewer, TOKENS) - call(dense, TOKENS)).max()) > 1e-3


def test_codebooks_are_fitted_to_the_calibrated_keys():
    def loss(sequences):
        rules = [TopL(**ATTENTION, keep=4, sequences=sequences)]
        found, _ = sparsify(model("llama"), rules, calibrate=calibrate if sequences else None)
        return float(sparsax.nn.with_quantisation_loss(found, TOKENS)[1])

    assert loss(4) < 0.7 * loss(0)


RULES = {
    "lora": LoRA(path=r".*attention\.(query|key|value|out)", rank=2),
    "routed": Routed(path=r".*\.ffn", num_blocks=4, active=4, tokens=64, lora_rank=2, frozen=True),
    "top_l": TopL(**ATTENTION, keep=32),
}


@pytest.mark.parametrize("order", [tuple(RULES), tuple(RULES)[::-1]], ids="-".join)
def test_one_call_converts_a_decoder_in_either_order(order):
    dense = model("llama")
    spt, _ = sparsify(dense, [RULES[name] for name in order], calibrate=calibrate)
    for block in spt.blocks:
        assert isinstance(block.attention, TopLAttention)
        assert isinstance(block.attention.query, LoRALinear)
        assert isinstance(block.ffn, RoutedFFN)
    assert_near(call(spt, TOKENS), call(dense, TOKENS), 1e-5, "logits")


def test_what_is_tuned_is_lora_and_routers_and_training_moves_it_alone():
    rules = [*RULES.values()]
    spt, _ = sparsify(model(), rules, calibrate=calibrate)
    wrt = nnx.Any(nnx.LoRAParam, sparsax.nn.RouterParam)
    optimizer = nnx.Optimizer(spt, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(TOKENS)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradients)
        return value

    frozen = nnx.All(nnx.Param, nnx.Not(wrt))
    before = jax.tree.map(np.array, nnx.state(spt, frozen))
    losses = [float(step(spt, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(spt, frozen))


class OwnAttention(nnx.Module):
    """A user's own layer: no attribute but the projections."""

    def __init__(self, rngs):
        dense = SparseAttention(2, 16, causal=True, rngs=rngs)
        self.query, self.key, self.value, self.out = dense.query, dense.key, dense.value, dense.out

    def __call__(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class Own(nnx.Module):
    def __init__(self):
        self.mix, self.idle = (OwnAttention(nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return x + self.mix(x)


X = jax.random.normal(jax.random.key(1), (2, 24, 16))


def test_a_users_own_layers_are_converted():
    rule = TopL(path="mix", keep=24, modules=(OwnAttention,), causal=True)
    new, _ = sparsify(Own(), [rule], calibrate=lambda m: m(X))
    assert isinstance(new.mix, TopLAttention)
    assert isinstance(new.idle, OwnAttention)
    assert_near(call(new, X), Own()(X), 1e-5, "y")


def with_a_pattern():
    dense = model()
    sparsax.nn.set_patterns(dense, sparsax.patterns.causal(32, block=16))
    return dense


REFUSED = {
    "pattern": (
        lambda: sparsify(with_a_pattern(), [TopL(**ATTENTION, keep=4, sequences=0)]),
        r"must be dense; got a layer with a pattern.*set_patterns\(model, None\)",
    ),
    "causal": (
        lambda: sparsify(Own(), [TopL(path="mix", keep=4, modules=(OwnAttention,), sequences=0)]),
        "give causal=, since 'mix' has no such attribute",
    ),
    "projections": (
        lambda: sparsify(model(), [TopL(path=".*ffn", keep=4, modules=(nnx.Module,), sequences=0)]),
        r"'blocks.0.ffn' must have the projections .*; FeedForward has no \['query'",
    ),
    "calibrate": (lambda: sparsify(model(), [TopL(**ATTENTION, keep=4)]), "pass calibrate="),
    "idle": (
        lambda: sparsify(
            Own(), [TopL(path="idle", keep=4, modules=(OwnAttention,), causal=True)],
            calibrate=lambda m: m(X),
        ),
        "'idle' was never called",
    ),
    "flat": (
        lambda: TopLAttention.from_attention(Flat(), keep=4, rngs=nnx.Rngs(0)),
        r"must map to \(heads, features of a head\).*Linear maps to 16",
    ),
}  # fmt: skip


class Flat(nnx.Module):
    def __init__(self):
        self.query = self.key = nnx.Linear(16, 16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    convert, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        convert()


def test_rotary_positions_are_those_of_the_dense_layer():
    dense = SparseAttention(2, 16, causal=True, rotary=100.0, use_bias=False, rngs=nnx.Rngs(0))
    layer = TopLAttention(
        2, 16, keep=24, causal=True, rotary=100.0, use_bias=False, rngs=nnx.Rngs(0)
    )
    layer.fit_codebooks(X)
    assert_near(call(layer, X), call(dense, X), 1e-5, "y")
    turned = jnp.flip(X, 1)
    assert float(abs(call(layer, turned) - jnp.flip(call(layer, X), 1)).max()) > 1e-3
