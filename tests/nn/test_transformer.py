import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsax
from sparsax.nn import Classifier, Decoder, Encoder, set_patterns
from tests.helpers import assert_near, launched

T, VOCAB, CLASSES = 64, 12, 5
BAND = sparsax.patterns.sliding_window(T, left=20, right=10, block=16)
SMALL = {"features": 16, "hidden": 32, "num_heads": 2, "layers": 1}


def tokens(batch=2):
    return jax.random.randint(jax.random.key(0), (batch, T), 1, VOCAB)


def classifier(pattern=None, **options):
    model = Classifier(VOCAB, T, CLASSES, rngs=nnx.Rngs(0), **SMALL, **options)
    set_patterns(model, pattern)
    return model


def decoder(pattern=None, **options):
    model = Decoder(VOCAB, T, rngs=nnx.Rngs(0), **SMALL, **options)
    set_patterns(model, pattern)
    return model


def test_shapes():
    assert Encoder(VOCAB, T, rngs=nnx.Rngs(0), **SMALL | {"layers": 2})(tokens()).shape == (
        2,
        T,
        16,
    )
    assert classifier()(tokens()).shape == (2, CLASSES)
    assert decoder()(tokens()).shape == (2, T, VOCAB)


@pytest.mark.parametrize(("pattern", "pruned"), [(None, "drop"), (BAND, "drop"), (BAND, "zero")])
def test_what_stands_at_padding_does_not_change_the_logits(pattern, pruned):
    model = classifier(pattern, pruned=pruned)
    padded = tokens().at[:, 40:].set(0)
    before = model(padded)
    embedding = model.encoder.tokens.embedding
    embedding[...] = embedding.at[0].set(100.0)  # what a padding token looks like
    np.testing.assert_allclose(model(padded), before, atol=1e-5)
    assert float(abs(model(padded.at[:, 39].set(0)) - before).max()) > 1e-4


def test_more_padding_does_not_change_the_logits():
    model = classifier()
    short = tokens()[:, :40]
    padded = jnp.pad(short, ((0, 0), (0, T - 40)))
    np.testing.assert_allclose(model(padded), model(short), atol=1e-5)


def test_without_a_padding_id_every_token_counts():
    model = classifier(padding_id=None)
    x = tokens().at[:, 40:].set(0)
    before = model(x)
    embedding = model.encoder.tokens.embedding
    embedding[...] = embedding.at[0].set(100.0)
    assert float(abs(model(x) - before).max()) > 1e-3


def test_a_sample_of_nothing_but_padding_is_finite():
    for pattern in (None, BAND):
        assert bool(jnp.isfinite(classifier(pattern)(jnp.zeros((1, T), int))).all())


@pytest.mark.parametrize(("pattern", "pruned"), [(None, "drop"), (BAND, "drop"), (BAND, "zero")])
def test_a_later_token_leaves_earlier_logits(pattern, pruned):
    model = decoder(pattern, pruned=pruned)
    x, place = tokens(), 30
    changed = x.at[:, place].set(x[:, place] % (VOCAB - 1) + 1)
    before, after = model(x), model(changed)
    np.testing.assert_allclose(after[:, :place], before[:, :place], atol=1e-6)
    assert float(abs(after[:, place:] - before[:, place:]).max()) > 1e-3


@pytest.mark.parametrize("make", [classifier, decoder])
def test_dropout_acts_when_rngs_are_given(make):
    model = make(dropout=0.5)
    np.testing.assert_array_equal(model(tokens()), model(tokens()))
    first, same, other = (model(tokens(), rngs=nnx.Rngs(dropout=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert float(abs(first - other).max()) > 1e-3
    assert float(abs(first - model(tokens())).max()) > 1e-3


@pytest.mark.parametrize("make", [classifier, decoder])
@pytest.mark.parametrize("pattern", [None, BAND])
def test_gradients_are_finite_and_none_is_missing(make, pattern):
    model = make(pattern, num_kv_heads=1)

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda m: (m(x, rngs=nnx.Rngs(dropout=0)) ** 2).mean())(model)

    gradients = gradient(model, tokens().at[:, 50:].set(0))
    flat = nnx.to_flat_state(gradients)
    assert len(flat) == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, value in flat:
        assert bool(jnp.isfinite(value.get_value()).all()), path


@pytest.mark.parametrize("make", [classifier, decoder])
def test_a_full_pattern_is_dense(make):
    padded = tokens().at[:, 50:].set(0)
    full = sparsax.patterns.full(T, block=16)
    assert_near(make(full)(padded), make()(padded), 1e-5, "logits")


def test_in_bfloat16_the_layers_compute_in_it_and_the_logits_do_not():
    want, model = classifier(BAND), classifier(BAND, dtype=jnp.bfloat16)
    block = model.encoder.blocks[0]
    x = jnp.ones((1, T, 16))
    assert block.up(x).dtype == block.attention(x).dtype == jnp.bfloat16
    assert model.encoder(tokens()).dtype == model(tokens()).dtype == jnp.float32
    assert 0 < float(abs(model(tokens()) - want(tokens())).max()) < 2e-2
    assert decoder(dtype=jnp.bfloat16)(tokens()).dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "kernels"), [(jnp.bfloat16, 3), (None, 0)])
def test_on_a_hopper_gpu_a_bfloat16_model_runs_the_kernels(dtype, kernels):
    options = {"features": 64, "hidden": 64, "num_heads": 2, "layers": 1, "dtype": dtype}
    model = Classifier(VOCAB, 256, CLASSES, rngs=nnx.Rngs(0), **options)
    pattern = sparsax.patterns.bigbird(256, block=32)

    def gradients(params, pattern, tokens):
        model = nnx.merge(graphdef, params, rest, copy=True)
        set_patterns(model, pattern)
        return nnx.grad(lambda m: (m(tokens) ** 2).mean())(model)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    with sparsax.pallas.lowering():
        step = jax.jit(gradients).trace(params, pattern, jnp.ones((2, 256), int))
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    # Forward, dq and dkv: so few rows need not be dealt out.
    assert launched(text) == kernels
