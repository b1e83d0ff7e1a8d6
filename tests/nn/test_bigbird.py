import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import CompoundPattern, nn
from tests.helpers import assert_gradients_near, assert_near, with_biases

B, T, N, D, BLOCK = 2, 198, 2, 16, 16  # 13 blocks, the last of 6 tokens
X = jax.random.normal(jax.random.key(0), (B, T, D))
REAL = np.arange(T) < np.array([[T], [150]])


def layer(**options):
    options = {"block": BLOCK, "random_blocks": 2, "rngs": nnx.Rngs(0)} | options
    return with_biases(nn.BigBirdSelfAttention(N, D, **options))


def dense(model, x, mask):
    """Softmax over the True pairs of `mask [B, N, T, T]`, in float64; rows without any are 0."""

    def project(linear):
        kernel, bias = (np.asarray(p[...], np.float64) for p in (linear.kernel, linear.bias))
        return np.einsum("btd,dnh->btnh", np.asarray(x, np.float64), kernel) + bias

    q, k, v = (project(p) for p in (model.query, model.key, model.value))
    p = np.where(mask, np.exp(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(D // N)), 0.0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    o = np.einsum("bnts,bsnh->btnh", p, v)
    kernel, bias = (np.asarray(p[...], np.float64) for p in (model.out.kernel, model.out.bias))
    return np.einsum("btnh,nhd->btd", o, kernel) + bias


def test_its_pairs_are_a_window_the_ends_and_random_blocks_of_each_head():
    mask = np.asarray(layer().pattern(T).to_mask())[0]
    blocks = np.pad(mask, ((0, 0), (0, 10), (0, 10))).reshape(N, 13, BLOCK, 13, BLOCK)
    blocks = blocks.any((2, 4))
    np.testing.assert_array_equal(blocks.repeat(BLOCK, 1).repeat(BLOCK, 2)[:, :T, :T], mask)
    i = np.arange(13)
    fixed = (abs(i - i[:, None]) <= 1) | (i % 12 == 0) | (i % 12 == 0)[:, None]
    assert blocks[:, fixed].all()
    drawn = (blocks & ~fixed).sum(-1)
    np.testing.assert_array_equal(drawn[:, 1:-1], 2)
    assert (blocks[0] != blocks[1]).any()
    other = np.asarray(layer(seed=1).pattern(T).to_mask())[0]
    assert (other != mask).any()


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_softmax_over_these_pairs_and_padding_is_zero(padded):
    model, real = layer(), REAL if padded else np.ones_like(REAL)
    mask = np.asarray(model.pattern(T).to_mask())
    mask = mask & (real[:, None, :, None] & real[:, None, None, :])
    call = nnx.jit(lambda m, x, r: m(x, key_mask=r if padded else None))
    y = call(model, X, jnp.asarray(real))
    assert_near(y, dense(model, X, mask), 1e-5, "y")
    if padded:
        np.testing.assert_array_equal(y[1, 150:], np.broadcast_to(model.out.bias[...], (48, D)))


def test_short_sequences_attend_densely():
    model = layer()
    short = (5 + 2 * 2) * BLOCK
    assert bool(model.pattern(short).to_mask().all())
    assert not bool(model.pattern(short + 1).to_mask().all())
    y = model(X[:, :100], key_mask=jnp.asarray(REAL[:, :100]))
    assert_near(y, dense(model, X[:, :100], np.ones((B, N, 100, 100), bool)), 1e-5, "y")


def test_random_blocks_of_another_draw():
    model = layer()
    pattern = layer(seed=5).pattern(T)
    want = dense(model, X, np.asarray(pattern.to_mask()))
    assert_near(model.attend(X, pattern), want, 1e-5, "y")
    assert isinstance(pattern, CompoundPattern)


def test_gradients_of_both_implementations():
    def gradients(implementation):
        model = layer(implementation=implementation)
        loss = lambda m, x: jnp.sum(jnp.sin(m(x, key_mask=jnp.asarray(REAL))))
        return nnx.state(nnx.jit(nnx.grad(loss))(model, X))

    found = gradients("xla")
    assert len(jax.tree.leaves(found)) == 8
    assert_gradients_near(found, gradients("reference"), 1e-5)


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    with pytest.raises(ValueError, match=r"num_heads in_features .*; got 3, 3 and 16"):
        nn.BigBirdSelfAttention(3, D, rngs=nnx.Rngs(0))
    for options in ({"block": 0}, {"random_blocks": -1}):
        with pytest.raises(ValueError, match="block must be at least 1 token and random_blocks"):
            layer(**options)
