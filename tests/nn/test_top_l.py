import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import sparsax
from sparsax.nn import Codebooks, TopLAttention, with_quantisation_loss
from tests.helpers import assert_near

T, D, N, BLOCK = 64, 32, 4, 8
SELECT = pytest.mark.parametrize("select", ["tokens", "blocks"])


def inputs(batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, T, D))


def tail_is_padding():
    return jnp.arange(T) < jnp.array([T, T // 3])[:, None]


# Compiled as a whole: one operation at a time, most of the time would go into compiling them.
run = nnx.jit(lambda model, x, key_mask=None: model(x, key_mask=key_mask))
fit = nnx.jit(lambda model, x: model.fit_codebooks(x))
loss_of = nnx.jit(lambda model, x: with_quantisation_loss(model, x))
encode = jax.jit(
    lambda quantizer, q, k, score: quantizer.codes(q, k, score=score), static_argnums=3
)


def layer(select="tokens", seed=0, fitted=True, **options):
    options = {"keep": 16, "block": BLOCK, "causal": True, "num_kv_heads": 2} | options
    model = TopLAttention(N, D, select=select, rngs=nnx.Rngs(seed), **options)
    if fitted:
        fit(model, inputs())
    return model


class Pair(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        options = {"keep": 16, "causal": True, **options}
        self.layers = nnx.List([TopLAttention(N, D, rngs=rngs, **options) for _ in range(2)])

    def __call__(self, x):
        for attention in self.layers:
            x = x + attention(x)
        return x


@pytest.mark.parametrize(("score", "padded"), [("match", True), ("adc", False)])
def test_tokens_are_projections_codes_and_one_call(score, padded):
    model, x, key_mask = layer(score=score), inputs(), tail_is_padding() if padded else None
    q, k, v = model.query(x), model.key(x), model.value(x)
    codes = encode(model.quantizer, q, k, score)
    o = sparsax.top_l_attention(
        q, k, v, codes, keep=16, causal=True, key_mask=key_mask, implementation="reference"
    )
    assert_near(run(model, x, key_mask), model.out(o), 1e-5, "output")


@pytest.mark.parametrize(("score", "voters"), [(None, 2), ("adc", None)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_are_every_samples_own_pattern(padded, score, voters):
    model = layer("blocks", score=score, voters=voters)
    x, key_mask = inputs(), tail_is_padding() if padded else None
    q, k, v = model.query(x), model.key(x), model.value(x)
    codes = encode(model.quantizer, q, k, score or "match")
    found = sparsax.top_l_blocks(
        codes, keep=16, block=BLOCK, voters=voters, causal=True, key_mask=key_mask
    )
    assert found.kv_num_blocks.shape == (2, 2, T // BLOCK)
    o = [
        sparsax.block_sparse_attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern, causal=True,
            key_mask=None if key_mask is None else key_mask[b : b + 1], implementation="reference",
        )
        for b, pattern in enumerate(found.unstack())
    ]  # fmt: skip
    assert_near(run(model, x, key_mask), model.out(jnp.concatenate(o)), 1e-5, "output")


@SELECT
def test_keeping_everything_is_dense_attention(select):
    model = layer(select, keep=2 * T)
    dense = sparsax.nn.SparseAttention(N, D, num_kv_heads=2, causal=True, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value", "out"):
        setattr(dense, name, getattr(model, name))
    assert_near(run(model, inputs()), run(dense, inputs()), 1e-5, "output")


@SELECT
def test_the_future_changes_nothing(select):
    model, x = layer(select), inputs()
    other = x.at[:, T // 2 :].set(inputs(seed=1)[:, T // 2 :])
    half = run(model, x)[:, : T // 2], run(model, other)[:, : T // 2]
    np.testing.assert_array_equal(*half)


@SELECT
def test_gradients_are_finite_and_reach_every_parameter(select):
    gradient = nnx.jit(lambda m, x: nnx.grad(lambda m: (m(x) ** 2).mean())(m))
    found = nnx.to_flat_state(gradient(layer(select), inputs()))
    assert {path[0] for path, _ in found} == {"query", "key", "value", "out"}
    for path, value in found:
        value = np.asarray(value.get_value())
        assert np.isfinite(value).all(), path
        if path != ("key", "bias"):
            assert abs(value).max() > 0, path


@pytest.mark.parametrize("score", ["match", "adc"])
def test_fitting_lowers_the_loss_and_repeats_itself(score):
    model, same = (layer(score=score, fitted=False) for _ in range(2))
    before = loss_of(model, inputs())[1]
    fit(model, inputs())
    fit(same, inputs())
    np.testing.assert_array_equal(model.codebooks[...], same.codebooks[...])
    out, after = loss_of(model, inputs())
    assert float(after) < 0.75 * float(before)
    np.testing.assert_array_equal(out, run(model, inputs()))
    assert not hasattr(model, "quantisation_loss")
    q, k = model.query(inputs()), model.key(inputs())
    queries = q if score == "match" else None
    assert_near(after, model.quantizer.loss(k, queries=queries), 1e-6, "loss")


def test_training_calls_move_the_codebooks_by_their_average():
    model = Pair(score="match", decay=0.9)
    fit(model.layers[0], inputs())
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    first = model.layers[0]
    x, before = inputs(seed=3), first.quantizer
    step(model, optimizer, x)
    np.testing.assert_array_equal(first.codebooks[...], before.codebooks)  # not training
    model.train()
    q, k = first.query(x), first.key(x)
    want, _ = before.update(k, queries=q, decay=0.9)
    step(model, optimizer, x)
    assert float(abs(want.codebooks - before.codebooks).max()) > 1e-3
    assert_near(first.codebooks[...], want.codebooks, 1e-5, "codebooks")
    assert_near(first.codebook_weights[...], want.weights, 1e-5, "weights")
    model.eval()
    after = first.codebooks[...]
    model(x)
    np.testing.assert_array_equal(first.codebooks[...], after)


def test_codebooks_can_be_trained_by_their_loss():
    model = Pair(score="match")
    wrt = nnx.Any(nnx.Param, Codebooks)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, x):
        def objective(model):
            _, loss = with_quantisation_loss(model, x)
            return loss

        loss, gradients = nnx.value_and_grad(objective, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, inputs())) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_codebooks_are_saved_and_restored_with_the_parameters(tmp_path):
    model, other = layer(), layer(seed=1, fitted=False)
    assert float(abs(run(model, inputs()) - run(other, inputs())).max()) > 1e-3
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(other))
        nnx.update(other, checkpointer.restore(tmp_path / "model", like))
    np.testing.assert_array_equal(other.codebooks[...], model.codebooks[...])
    np.testing.assert_array_equal(run(other, inputs()), run(model, inputs()))


def test_split_and_merge_carry_the_codebooks():
    model = layer()
    definition, codebooks, rest = nnx.split(model, Codebooks, ...)
    assert {path for path, _ in nnx.to_flat_state(codebooks)} == {("codebooks",)}
    merged = nnx.merge(definition, codebooks, rest)
    np.testing.assert_array_equal(run(merged, inputs()), run(model, inputs()))


REFUSED = {
    "heads": ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads.*got 3, 4 and 32"),
    "head_dim": ({"head_dim": 12}, "head_dim must be a multiple of 8.*got 12, 16 and 0.99"),
    "keep": ({"keep": 0}, "keep at least 1.*got 8, 0 and"),
    "decay": ({"decay": 1.0}, r"decay within \[0, 1\); got 8, 16 and 1.0"),
    "select": ({"select": "rows"}, r"select must be one of \('tokens', 'blocks'\); got 'rows'"),
    "voters": ({"select": "blocks", "voters": 3}, "divides the 8 queries.*got 3"),
    "score": ({"score": "dot"}, r"score must be one of \('match', 'adc'\); got 'dot'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"no sparsax.nn.TopLAttention layer; got Linear"):
        with_quantisation_loss(nnx.Linear(D, D, rngs=nnx.Rngs(0)), inputs())
