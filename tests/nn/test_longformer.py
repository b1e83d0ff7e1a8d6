import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import nn
from tests.helpers import assert_gradients_near, assert_near, with_biases

B, T, N, D = 2, 45, 2, 16
X = jax.random.normal(jax.random.key(0), (B, T, D))
GLOBAL = np.isin(np.arange(T), [0, 7, 30]) & (np.arange(B)[:, None] < 1)
GLOBAL[1, 12] = True
REAL = np.arange(T) < np.array([[T], [33]])


def layer(**options):
    options = {"window": 4, "max_global": 5, "rngs": nnx.Rngs(0)} | options
    return with_biases(nn.LongformerSelfAttention(N, D, **options))


def project(linear, x):
    kernel, bias = (np.asarray(p.get_value(), np.float64) for p in (linear.kernel, linear.bias))
    return np.einsum("td,dnh->tnh", x, kernel) + bias


def softmax(scores, mask):
    p = np.where(mask, np.exp(scores - scores.max()), 0.0)
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def longformer(model, x, chosen, real, gap):
    """Longformer's attention of one sample, its two softmaxes written down row by row."""
    q, k, v = (project(p, x) for p in (model.query, model.key, model.value))
    own = model.query_global, model.key_global, model.value_global
    q_global, k_global, v_global = (project(p, x) for p in own)
    o = np.zeros((T, N, D // N))
    for n in range(N):
        for i in range(T):
            if not real[i]:
                continue
            queries, keys, values = (q, k, v) if not chosen[i] else (q_global, k_global, v_global)
            seen = (chosen | (abs(gap[i]) <= 4) | chosen[i]) & real
            p = softmax(queries[i, n] @ keys[:, n].T / np.sqrt(D // N), seen)
            o[i, n] = p @ values[:, n]
    kernel, bias = (
        np.asarray(p.get_value(), np.float64) for p in (model.out.kernel, model.out.bias)
    )
    return np.einsum("tnh,nhd->td", o, kernel) + bias


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_longformers_attention(padded):
    model, real = layer(), REAL if padded else np.ones_like(REAL)
    gap = np.arange(T) - np.arange(T)[:, None]
    want = [
        longformer(model, np.asarray(X[b], np.float64), GLOBAL[b], real[b], gap) for b in (0, 1)
    ]
    call = nnx.jit(lambda m, x, g, r: m(x, global_mask=g, key_mask=r if padded else None))
    assert_near(call(model, X, jnp.asarray(GLOBAL), jnp.asarray(real)), np.stack(want), 1e-5, "y")


def test_without_global_tokens_their_projections_do_not_count():
    model = layer()
    want = model(X)
    assert_near(model(X, global_mask=jnp.zeros((B, T), bool)), want, 1e-6, "none chosen")
    changed = layer()
    changed.query_global = changed.key_global
    np.testing.assert_array_equal(changed(X), want)


def test_every_projection_gets_a_gradient_and_both_implementations_the_same():
    def gradients(implementation):
        model = layer(implementation=implementation)
        loss = lambda m, x: jnp.sum(jnp.sin(m(x, global_mask=jnp.asarray(GLOBAL))))
        return nnx.state(nnx.jit(nnx.grad(loss))(model, X))

    found = gradients("xla")
    assert len(jax.tree.leaves(found)) == 14
    assert_gradients_near(found, gradients("reference"), 1e-5)


def test_too_many_global_tokens_are_refused_or_nan():
    model, chosen = layer(), jnp.zeros((B, T), bool).at[0, :6].set(True)
    with pytest.raises(ValueError, match="capacity must hold the longest list, 6 tokens; got 5"):
        model(X, global_mask=chosen)
    y = nnx.jit(lambda m, x, g: m(x, global_mask=g))(model, X, chosen)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    make = lambda heads=2, **options: nn.LongformerSelfAttention(
        heads, D, **{"window": 4, "max_global": 5, "rngs": nnx.Rngs(0)} | options
    )
    with pytest.raises(ValueError, match="num_heads must divide in_features; got 3 and 16"):
        make(3)
    for options in ({"window": -1}, {"max_global": -1}, {"dilation": 0}):
        with pytest.raises(ValueError, match=r"window \(one-sided\) and max_global must be"):
            make(**options)
