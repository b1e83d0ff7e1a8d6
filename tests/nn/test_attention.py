import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import sparsax
from sparsax.nn import SparseAttention, attention_fn, get_patterns, score_maps, set_patterns
from tests.helpers import assert_near, launched

T, D, N, BLOCK = 64, 16, 4, 16
FULL = sparsax.patterns.full(T, block=BLOCK)
BAND = sparsax.patterns.sliding_window(T, left=20, right=10, block=BLOCK)


def inputs(batch=2):
    return jax.random.normal(jax.random.key(0), (batch, T, D))


def tail_is_padding(batch=2):
    return jnp.arange(T) < jnp.array([T, T // 3])[:batch, None]


def layer(pattern=None, **options):
    return SparseAttention(N, D, pattern=pattern, rngs=nnx.Rngs(0), **options)


class Stack(nnx.Module):
    def __init__(self, layers, **options):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([SparseAttention(N, D, rngs=rngs, **options) for _ in range(layers)])

    def __call__(self, x, **options):
        for attention in self.layers:
            x = x + attention(x, **options)
        return x


class Parallel(Stack):
    def __call__(self, x):
        return sum(attention(x) for attention in self.layers)


@pytest.mark.parametrize(
    ("causal", "num_kv_heads", "padded"),
    [(False, None, False), (True, 2, False), (False, 1, True), (True, 4, True)],
)
def test_dense_is_the_full_pattern(causal, num_kv_heads, padded):
    model = layer(causal=causal, num_kv_heads=num_kv_heads)
    key_mask = tail_is_padding() if padded else None
    dense = model(inputs(), key_mask=key_mask)
    set_patterns(model, FULL)
    assert_near(model(inputs(), key_mask=key_mask), dense, 1e-5, "output")


def test_dense_cudnn_takes_padding_at_the_end_and_is_nan_for_any_other(monkeypatch):
    asked, attend = [], jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **options):  # there is no cuDNN without a GPU
        asked.append(implementation)
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    x, mask = inputs(), tail_is_padding()
    want, got = (layer(dense=name)(x, key_mask=mask) for name in ("xla", "cudnn"))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert asked == ["xla", "cudnn"]
    bad = layer(dense="cudnn")(x, key_mask=mask.at[1].set(mask[1, ::-1]))
    np.testing.assert_allclose(bad[0], want[0], atol=1e-6)
    assert np.isnan(bad[1]).all()
    np.testing.assert_array_equal(layer(dense="cudnn")(x), layer()(x))


@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_layer_is_its_projections_and_one_call(pruned, implementation):
    model = layer(BAND, num_kv_heads=2, pruned=pruned, implementation=implementation)
    x, key_mask = inputs(), tail_is_padding()
    q, k, v = model.query(x), model.key(x), model.value(x)
    o = sparsax.block_sparse_attention(
        q, k, v, BAND, pruned=pruned, key_mask=key_mask, implementation="reference"
    )
    assert_near(model(x, key_mask=key_mask), model.out(o), 1e-5, "output")


def test_what_pruned_keys_count_changes_the_output():
    drop, zero = (layer(BAND, pruned=pruned)(inputs()) for pruned in ("drop", "zero"))
    assert float(abs(drop - zero).max()) > 1e-3


def test_head_dim_and_dtype_are_the_callers_choice():
    model = SparseAttention(3, D, head_dim=8, pattern=BAND, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert model.query(inputs()).shape == (2, T, 3, 8)
    assert model(inputs()).dtype == jnp.bfloat16


@pytest.mark.parametrize("pattern", [None, BAND])
def test_gradients_are_finite_and_reach_every_parameter(pattern):
    model = layer(pattern)

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda m: (m(x) ** 2).mean())(model)

    gradients = nnx.to_flat_state(gradient(model, inputs()))
    assert {path[0] for path, _ in gradients} == {"query", "key", "value", "out"}
    for path, value in gradients:
        value = np.asarray(value.get_value())
        assert np.isfinite(value).all(), path
        if path != ("key", "bias"):  # softmax does not see a constant added to a row of logits
            assert abs(value).max() > 0, path


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, None), (4, 3)])
def test_heads_that_do_not_divide_are_refused(heads, kv_heads):
    with pytest.raises(ValueError, match=r"num_kv_heads must divide num_heads.*got"):
        SparseAttention(heads, D, num_kv_heads=kv_heads, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("causal", "padded"), [(False, False), (True, False), (False, True)])
def test_score_maps_are_those_of_the_layers_queries_and_keys(causal, padded):
    model = layer(causal=causal, num_kv_heads=2)
    x, key_mask = inputs(), tail_is_padding() if padded else None
    (found,) = score_maps(model, x, key_mask=key_mask)
    want = sparsax.score_map(model.query(x), model.key(x), causal=causal, key_mask=key_mask)
    assert_near(found, want, 1e-6, "map")
    rows = np.ones(T) if key_mask is None else np.asarray(key_mask, float).mean(0)
    np.testing.assert_allclose(found.sum(-1)[0], rows, atol=1e-5)


def test_score_maps_per_head_give_a_pattern_for_every_head():
    model = Stack(2)
    maps = nnx.jit(score_maps, static_argnames="per_head")(model, inputs(), per_head=True)
    heads = model.layers[0].query(inputs()).shape[2]
    assert maps.shape == (2, heads, T, T)
    assert_near(maps.mean(1, keepdims=True), score_maps(model, inputs()), 1e-6, "mean of heads")
    found = sparsax.patterns.spion.search(maps, block=16, quantile=0.5)
    set_patterns(model, found)
    assert [pattern.num_heads for pattern in get_patterns(model)] == [heads, heads]
    assert bool(jnp.isfinite(model(inputs())).all())


def test_pooled_score_maps_are_what_variant_f_searches():
    model, settings = Stack(2), {"block": 16, "variant": "F", "quantile": 0.5}
    pooled = score_maps(model, inputs(), pool=16)
    want = sparsax.patterns.spion.search(score_maps(model, inputs()), **settings)
    found = sparsax.patterns.spion.search(pooled, **settings, length=T)
    np.testing.assert_array_equal(found.to_block_mask(), want.to_block_mask())


@pytest.mark.parametrize("pattern", [None, BAND])
def test_score_maps_work_under_jit_and_leave_the_model_as_it_was(pattern):
    model = Stack(2)
    set_patterns(model, pattern)
    before = nnx.to_pure_dict(nnx.state(model))
    graph = nnx.graphdef(model)
    maps = nnx.jit(score_maps)(model, inputs())
    assert maps.shape == (2, 1, T, T)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)
    assert_near(score_maps(model, inputs()), maps, 1e-6, "maps")
    assert nnx.graphdef(model) == graph
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


def test_score_maps_are_in_the_order_of_the_layers_beyond_ten():
    model = Parallel(11)
    x = inputs(1)[:, :8]
    maps = nnx.jit(score_maps)(model, x)
    for i in (1, 2, 10):
        q, k = model.layers[i].query(x), model.layers[i].key(x)
        want = sparsax.score_map(q, k, implementation="reference")
        assert_near(maps[i], want, 1e-5, f"map {i}")


def test_a_probe_that_fails_switches_probing_off_again():
    model = Stack(2)
    with pytest.raises(TypeError):
        score_maps(model, inputs(), no_such_argument=1)
    assert not any(attention.probing for attention in model.layers)


def blocks(model):
    return [p if p is None else np.asarray(p.to_block_mask()).tolist() for p in get_patterns(model)]


def test_patterns_are_set_and_read_back():
    model = Stack(2)
    band, full = (np.asarray(p.to_block_mask()).tolist() for p in (BAND, FULL))
    assert blocks(model) == [None, None]
    set_patterns(model, BAND)
    assert blocks(model) == [band, band]
    set_patterns(model, [FULL, None])
    assert blocks(model) == [full, None]
    set_patterns(model, sparsax.BlockPattern.stack([FULL, BAND]))
    assert blocks(model) == [full, band]
    set_patterns(model, None)
    assert blocks(model) == [None, None]


def test_a_searched_pattern_of_the_maps_fits():
    model = Stack(2)
    maps = score_maps(model, inputs())
    set_patterns(model, sparsax.patterns.spion.search(maps, block=BLOCK, quantile=0.5))
    assert bool(jnp.isfinite(model(inputs())).all())


def test_a_new_pattern_of_the_same_capacity_does_not_compile_again():
    model = layer(FULL)
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    outputs = []
    for pattern in (FULL, BAND):
        set_patterns(model, pattern)
        outputs.append(run(model, inputs()))
    assert len(traces) == 1
    assert float(abs(outputs[0] - outputs[1]).max()) > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_patterns_is_refused(count):
    with pytest.raises(ValueError, match=f"has 2 SparseAttention layers; got {count} patterns"):
        set_patterns(Stack(2), [BAND] * count)
    with pytest.raises(ValueError, match=f"has 2 SparseAttention layers; got {count} patterns"):
        set_patterns(Stack(2), sparsax.BlockPattern.stack([BAND] * count))


def test_a_model_without_sparse_attention_is_refused():
    model = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    for call in (get_patterns, score_maps, lambda m: set_patterns(m, BAND)):
        with pytest.raises(ValueError, match=r"no sparsax.nn.SparseAttention layer; got Linear"):
            call(model)


def multi_head(**options):
    return nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_fn_with_a_full_pattern_is_the_default(padded):
    mask = tail_is_padding()[:, None, None, :] if padded else None
    got = multi_head(attention_fn=attention_fn(FULL))(inputs(), mask=mask)
    assert_near(got, multi_head()(inputs(), mask=mask), 1e-5, "output")


def test_on_a_hopper_gpu_bfloat16_layers_run_the_kernels():
    pattern = sparsax.patterns.bigbird(256, block=32)
    own = SparseAttention(2, 64, pattern=pattern, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(
        2, 64, attention_fn=attention_fn(pattern), decode=False, dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    for model in (own, flax):
        with sparsax.pallas.lowering():
            forward = jax.jit(lambda x, model=model: model(x)).trace(jnp.ones((1, 256, 64)))
            text = forward.lower(lowering_platforms=("cuda",)).as_text()
        assert launched(text) == 1


def test_attention_fn_follows_its_pattern():
    got = multi_head(attention_fn=attention_fn(BAND))(inputs())
    want = multi_head()(inputs(), mask=BAND.to_mask()[None])
    assert_near(got, want, 1e-5, "output")


def test_attention_fn_refuses_what_block_lists_cannot_express():
    attend = attention_fn(BAND)
    with pytest.raises(
        ValueError, match=r"mask must be a key-padding mask .* got \(1, 1, 64, 64\)"
    ):
        multi_head(attention_fn=attend)(inputs(), mask=jnp.ones((1, 1, T, T), bool))
    with pytest.raises(ValueError, match=r"no sow_weights; got .*sow_weights=True"):
        multi_head(attention_fn=attend)(inputs(), sow_weights=True)
    dropping = multi_head(attention_fn=attend, dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match=r"no dropout_rate > 0 while training.*dropout_rate=0.1"):
        dropping(inputs())
    q = jnp.ones((2, T, N, 4))
    with pytest.raises(ValueError, match=r"takes no bias.*bias=True"):
        attend(q, q, q, bias=jnp.zeros((2, N, T, T)))


def test_a_layer_inside_a_linen_model():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return nnx.bridge.ToLinen(SparseAttention, args=(N, D), kwargs={"pattern": BAND})(x)

    variables = Model().init(jax.random.key(0), inputs())
    assert set(variables) == {"params", "Pattern"}
    got = jax.jit(Model().apply)(variables, inputs())
    assert_near(got, Model().apply(variables, inputs()), 1e-5, "output")

    params = variables["params"]["ToLinen_0"]
    model = layer(BAND)
    for name in ("query", "key", "value", "out"):
        projection = getattr(model, name)
        projection.kernel[...], projection.bias[...] = params[name]["kernel"], params[name]["bias"]
    assert_near(got, model(inputs()), 1e-5, "output")


@pytest.mark.parametrize("form", ["state", "pure dict"])
def test_the_pattern_is_saved_and_restored_with_the_parameters(tmp_path, form):
    model, other = layer(BAND), SparseAttention(N, D, pattern=FULL, rngs=nnx.Rngs(1))
    assert float(abs(model(inputs()) - other(inputs())).max()) > 1e-3
    tree = nnx.state if form == "state" else lambda m: nnx.to_pure_dict(nnx.state(m))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", tree(model))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree(other))
        restored = checkpointer.restore(tmp_path / "model", like)
    state = nnx.state(other)
    if form == "state":
        state = restored
    else:
        nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    assert other.pattern.get_value().geometry == BAND.geometry
    np.testing.assert_array_equal(other(inputs()), model(inputs()))
