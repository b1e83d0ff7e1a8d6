"""Feed-forward layers of whole models to routed blocks."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsax import sparsify
from sparsax.nn import DecoderConfig, LanguageModel, RoutedFFN
from sparsax.rules import LoRA, Routed
from tests.helpers import assert_near

SIZES = {"vocab_size": 40, "length": 32, "features": 16, "hidden": 64, "num_heads": 2, "layers": 2}
TOKENS = jax.random.randint(jax.random.key(0), (4, 32), 0, 40)
RULE = {"path": r".*\.ffn", "num_blocks": 4}


def model(style="opt"):
    return LanguageModel(getattr(DecoderConfig, style)(**SIZES), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("style", ["opt", "llama"])
def test_all_blocks_with_lora_are_the_dense_model(style):
    dense = model(style)
    rules = [Routed(**RULE, active=4, tokens=0, lora_rank=2), LoRA(path=r".*attention.*", rank=2)]
    routed, report = sparsify(dense, rules)
    assert all(isinstance(block.ffn, RoutedFFN) for block in routed.blocks)
    assert_near(routed(TOKENS), dense(TOKENS), 1e-5, "logits")
    assert [row.detail for row in report.rows][:2] == ["4 of 4 blocks, LoRA of rank 2"] * 2


@pytest.mark.parametrize("style", ["opt", "llama"])
def test_work_is_that_of_the_active_blocks(style):
    matrices = 3 if style == "llama" else 2
    _, report = sparsify(model(style), [Routed(**RULE, active=1, tokens=0, lora_rank=2)])
    dense, router = 2 * matrices * 16 * 64, 2 * 16 * 4
    lora = 2 * matrices * 2 * (16 + 64 // 4)
    assert {row.flops for row in report.rows} == {(dense, dense // 4 + lora + router)}
    assert report.rows[0].parameters[0] == matrices * 16 * 64 + (64 + 16) * (style == "opt")


def test_calibrated_blocks_are_nearer_to_the_dense_model():
    dense = model()
    for block in dense.blocks:  # units that fire seldom, as in a trained model
        block.ffn.up.bias[...] -= 0.5
    calibrate = lambda m: [m(TOKENS), m((TOKENS + 1) % 40)]
    far, _ = sparsify(dense, [Routed(**RULE, active=2, tokens=0)])
    near, _ = sparsify(dense, [Routed(**RULE, active=2, tokens=256)], calibrate=calibrate)
    want, x = dense.blocks[0].ffn, jax.random.normal(jax.random.key(1), (500, 16))
    error = lambda m: jnp.linalg.norm(m.blocks[0].ffn(x) - want(x))
    assert error(near) < 0.8 * error(far)


def test_layers_keep_their_products_where_the_rule_says_so():
    for recompute in (True, False):
        rule = Routed(**RULE, active=2, tokens=0, recompute=recompute)
        layers, _ = sparsify(model(), [rule])
        assert {block.ffn.recompute for block in layers.blocks} == {recompute}
    assert Routed().recompute


class Net(nnx.Module):
    """A user's own layer, under a user's own names."""

    def __init__(self):
        self.fc1 = nnx.Linear(8, 32, rngs=nnx.Rngs(0))
        self.fc2 = nnx.Linear(32, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


class Own(nnx.Module):
    def __init__(self):
        self.net, self.idle = Net(), Net()

    def __call__(self, x):
        return self.net(x)


OWN = {"modules": (Net,), "up": "fc1", "down": "fc2", "activation": "relu", "num_blocks": 4}


def test_a_users_own_layers_are_converted_by_name():
    x = jax.random.normal(jax.random.key(1), (5, 8))
    routed, _ = sparsify(Own(), [Routed(**OWN, path="net", active=4, tokens=0)])
    assert isinstance(routed.net, RoutedFFN)
    assert isinstance(routed.idle, Net)
    assert_near(routed(x), Own()(x), 1e-5, "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": "first"}, "'net' must have the attributes 'first' and 'fc2'; Net has no 'first'"),
        ({"activation": None}, "give activation=, since 'net' does not name its own"),
        ({"tokens": 9}, "pass calibrate="),
        ({"num_blocks": 5}, "5"),
    ],
)
def test_refusals(change, message):
    rule = Routed(**({"path": "net", "active": 2, "tokens": 0} | OWN | change))
    with pytest.raises(ValueError, match=message):
        sparsify(Own(), [rule])


def test_a_layer_that_calibration_does_not_reach_is_refused():
    rule = Routed(**OWN, path="idle", active=2, tokens=9)
    with pytest.raises(ValueError, match="'idle' was never called"):
        sparsify(Own(), [rule], calibrate=lambda m: m(jnp.ones((4, 8))))


def test_calibration_that_is_not_finite_is_refused():
    rule = Routed(**OWN, path="net", active=2, tokens=9)
    with pytest.raises(ValueError, match="must reach 'net' as finite numbers; some of its 4 "):
        sparsify(Own(), [rule], calibrate=lambda m: m(jnp.full((4, 8), jnp.nan)))
