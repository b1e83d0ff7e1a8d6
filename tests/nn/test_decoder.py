"""Language models in two styles, and rotary positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsax
from sparsax.nn import DecoderConfig, LanguageModel, rotate
from tests.helpers import assert_near

SIZES = {"vocab_size": 50, "length": 64, "features": 32, "hidden": 48, "num_heads": 4, "layers": 2}
OPT = DecoderConfig.opt(**SIZES)
LLAMA = DecoderConfig.llama(**SIZES, num_kv_heads=2)
STYLES = pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
TOKENS = jax.random.randint(jax.random.key(0), (2, 64), 0, 50)


def test_styles_have_the_parts_of_their_models():
    opt, llama = (LanguageModel(config, rngs=nnx.Rngs(0)) for config in (OPT, LLAMA))
    names = lambda model: {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert "bias" in names(opt)
    assert "bias" not in names(llama)
    assert opt.positions is not None
    assert llama.positions is None
    assert opt.blocks[0].ffn.gate is None
    assert llama.blocks[0].ffn.gate is not None
    assert llama.blocks[0].attention.key.kernel.shape == (32, 2, 8)
    assert isinstance(llama.norm, nnx.RMSNorm)


@STYLES
def test_no_token_sees_what_comes_after(config):
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    changed = TOKENS.at[:, 40].add(1) % 50
    one, two = model(TOKENS), model(changed)
    np.testing.assert_array_equal(one[:, :40], two[:, :40])
    assert (one[:, 40:] != two[:, 40:]).any(-1).all()


@STYLES
def test_the_causal_pattern_changes_nothing_and_padding_is_not_seen(config):
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    key_mask = jnp.arange(64) < jnp.array([[64], [50]])
    dense = model(TOKENS, key_mask=key_mask)
    sparsax.nn.set_patterns(model, sparsax.patterns.causal(64, block=16))
    assert_near(model(TOKENS, key_mask=key_mask), dense, 1e-5, "logits")
    padded = TOKENS.at[1, 50:].set(7)
    assert_near(model(padded, key_mask=key_mask)[1, :50], dense[1, :50], 1e-5, "logits")


@STYLES
def test_gated_layers_compute_their_formula(config):
    ffn = LanguageModel(config, rngs=nnx.Rngs(0)).blocks[0].ffn
    x = jax.random.normal(jax.random.key(1), (5, 32))
    if config.gated:
        want = (jax.nn.silu(x @ ffn.gate.kernel) * (x @ ffn.up.kernel)) @ ffn.down.kernel
    else:
        want = jax.nn.relu(x @ ffn.up.kernel + ffn.up.bias) @ ffn.down.kernel + ffn.down.bias
    assert_near(ffn(x), want, 1e-5, "ffn")


def test_rotary_angles_are_those_of_complex_numbers():
    x = np.asarray(jax.random.normal(jax.random.key(2), (2, 9, 3, 8)))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * np.arange(9)[:, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    )
    want = np.concatenate([turned.real, turned.imag], -1)
    assert_near(rotate(jnp.asarray(x), 100.0), want, 1e-6, "rotated")


def test_rotary_products_hang_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(3), (2, 1, 1, 1, 16))
    q, k = (rotate(jnp.broadcast_to(x, (1, 12, 1, 16))) for x in (q, k))
    products = np.asarray(jnp.einsum("bthd,bshd->ts", q, k))
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(products[0] - products[0, 0]).max() > 0.1


def test_refusals():
    with pytest.raises(ValueError, match="no more than the config's length=64; got 65"):
        LanguageModel(OPT, rngs=nnx.Rngs(0))(jnp.zeros((1, 65), jnp.int32))
    LanguageModel(LLAMA, rngs=nnx.Rngs(0))(jnp.zeros((1, 65), jnp.int32))
    odd = dataclasses.replace(OPT)
    object.__setattr__(odd, "norm", "batch")  # past the tests' own type checks
    with pytest.raises(ValueError, match=r"norm must be one of .*got 'batch'"):
        LanguageModel(odd, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="even number of head features; got 3"):
        rotate(jnp.ones((1, 2, 1, 3)))
