import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import Band, CompoundPattern, block_sparse_attention, compound_attention, patterns
from sparsax.patterns import compound
from tests.compound_cases import CASES, SCATTERED, case
from tests.helpers import assert_near

BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
BOTH = pytest.mark.parametrize("implementation", ["reference", "xla"])
NAMES = ("q_global", "k_global", "v_global")


@functools.partial(jax.jit, static_argnums=(3, 4))
def attend_and_pull(arrays, pattern, do, scale, implementation):
    """`o` and the gradients of q, k, v and, when given, of the projections of global rows."""

    def attend(q, k, v, *projected):
        own = dict(zip(NAMES, projected, strict=False))
        return compound_attention(
            q, k, v, pattern, **own, scale=scale, implementation=implementation
        )

    o, pull = jax.vjp(attend, *arrays)
    return o, pull(do)


def run(c, implementation, dtype=None, pattern=None):
    *qkv, projected, do = c.inputs()
    arrays = [x.astype(dtype or c.dtype) for x in (*qkv, *projected, do)]
    pattern = c.pattern() if pattern is None else pattern
    return attend_and_pull(arrays[:-1], pattern, arrays[-1], c.scale, implementation)


@BY_NAME
def test_values_and_gradients_match_the_float32_reference(c):
    o, gradients = run(c, "xla")
    want_o, want = run(c, "reference", "float32")
    assert o.dtype == jnp.dtype(c.dtype)
    assert_near(o, want_o, c.tolerance.output, "o")
    names = ("dq", "dk", "dv", *NAMES)
    for name, got, expected in zip(names, gradients, want, strict=False):
        assert got.dtype == jnp.dtype(c.dtype)
        assert_near(got, expected, c.tolerance.gradient, name)


def softmax_over(mask, q, k, v):
    """Softmax over the True pairs of `mask [T, T]`, one head at a time, in float64."""
    o = np.zeros(q.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        p = np.where(mask, np.exp(q[b, :, n] @ k[b, :, n].T / np.sqrt(q.shape[-1])), 0.0)
        o[b, :, n] = p / np.maximum(p.sum(-1, keepdims=True), 1e-300) @ v[b, :, n]
    return o


@BOTH
def test_global_rows_take_their_own_projections_and_see_all(implementation):
    """The semantics of Longformer's code, written down once more."""
    c = case("longformer_own")
    q, k, v, (q_global, k_global, v_global), _ = c.inputs()
    tokens = np.array([0, 17, 61])
    pattern = compound.longformer(c.T, window=4, positions=tokens[None])
    q_global = q_global[:, :3]
    gap = np.arange(c.T) - np.arange(c.T)[:, None]
    want = softmax_over((abs(gap) <= 4) | np.isin(np.arange(c.T), tokens), q, k, v)
    want[:, tokens] = softmax_over(np.ones((3, c.T), bool), q_global, k_global, v_global)
    o = compound_attention(
        q, k, v, pattern, q_global=q_global, k_global=k_global, v_global=v_global,
        implementation=implementation,
    )  # fmt: skip
    assert_near(o, want, 1e-5, "o")


@BOTH
def test_each_pair_counts_once_however_many_parts_hold_it(implementation):
    q, k, v, *_ = case("longformer").inputs()
    t = q.shape[1]
    everywhere = np.tile(np.arange(t), 2)[None]
    pattern = CompoundPattern.from_parts(
        t, bands=[Band(t, t), Band(t, t, 2), Band(3, 3)], columns=everywhere,
        rows=everywhere[:, :9],
        blocks=patterns.full(t, block=16), elements=compound.random_elements(t, keys_per_query=t),
    )  # fmt: skip
    o = jax.jit(functools.partial(compound_attention, implementation=implementation))(
        q, k, v, pattern
    )
    assert_near(o, jax.nn.dot_product_attention(q, k, v), 1e-5, "o")


def test_blocks_alone_are_block_sparse_attention():
    q, k, v, *_ = case("bigbird").inputs()
    blocks = patterns.bigbird(q.shape[1], block=8, heads=2)
    o = compound_attention(q, k, v, CompoundPattern.from_parts(q.shape[1], blocks=blocks))
    assert_near(o, block_sparse_attention(q, k, v, blocks), 1e-6, "o")


def test_padding_is_zero_and_has_no_gradient():
    c = case("longformer_padded_own")
    o, gradients = run(c, "xla")
    for x in (o, *gradients[:3], *gradients[4:]):
        np.testing.assert_array_equal(x[1, 40:], 0.0)
        assert float(abs(x[1, :40]).max()) > 0


def test_large_logits_do_not_overflow():
    q, k, v, *_ = case("longformer").inputs()
    pattern = case("longformer").pattern()
    attend = lambda name: compound_attention(300 * q, k, v, pattern, implementation=name)
    assert_near(attend("xla"), attend("reference"), 1e-3, "o")


@pytest.mark.parametrize("name", ["everything_per_head", "longformer_own"])
def test_two_runs_give_the_same_bits(name):
    chex.assert_trees_all_equal(run(case(name), "xla"), run(case(name), "xla"))


def test_with_and_without_jit():
    q, k, v, *_ = case("longformer").inputs()
    pattern = case("longformer").pattern()
    want = compound_attention(q, k, v, pattern, implementation="reference")
    assert_near(compound_attention(q, k, v, pattern), want, 1e-5, "without")


def documents():
    """Patterns of three batches of documents, of one shape."""
    rng = np.random.default_rng(0)
    make = lambda: compound.longformer(
        70, window=5, positions=rng.integers(0, 70, (2, 5)), counts=rng.integers(0, 6, 2),
        token_mask=np.arange(70) < rng.integers(40, 70, (2, 1)),
    )  # fmt: skip
    return [make() for _ in range(3)]


def stack(each):
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def loss_of(implementation):
    def loss(q, k, v, pattern):
        o = compound_attention(q, k, v, pattern, implementation=implementation)
        return jnp.sum(jnp.sin(3 * o))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def test_another_document_does_not_compile_again():
    q, k, v, *_ = case("longformer").inputs()
    step = jax.jit(loss_of("xla"))
    results = [float(step(q, k, v, pattern)[0]) for pattern in documents()]
    assert step._cache_size() == 1
    assert len(set(results)) == 3


def test_vmap_over_documents():
    q, k, v, *_ = case("longformer").inputs()
    got = jax.jit(jax.vmap(loss_of("xla"), (None, None, None, 0)))(q, k, v, stack(documents()))
    for i, pattern in enumerate(documents()):
        want = jax.jit(loss_of("reference"))(q, k, v, pattern)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_near(a[i], b, 2e-5, f"pattern {i}")


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_stacked_patterns_and_checkpoint(remat):
    q, k, v, *_ = case("longformer").inputs()

    def layer(x, pattern, implementation):
        return x + compound_attention(x, k, v, pattern, implementation=implementation), None

    def scanned(x, stacked):
        step = functools.partial(layer, implementation="xla")
        return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, x, stacked)[0] ** 2)

    def looped(x):
        for pattern in documents():
            x, _ = layer(x, pattern, "reference")
        return jnp.sum(x**2)

    got = jax.jit(jax.value_and_grad(scanned))(q, stack(documents()))
    want = jax.jit(jax.value_and_grad(looped))(q)
    assert_near(got[0], want[0], 1e-5, "loss")
    assert_near(got[1], want[1], 1e-5, "gradient")


@pytest.mark.parametrize("name", ["everything_per_kv_head", "longformer_padded_own", "mqa"])
def test_shard_map_over_batch_and_heads(name):
    c = case(name)
    *qkv, projected, do = c.inputs()
    pattern = c.pattern()
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "heads"))
    by_both = Spec("batch", None, "heads")
    kv = by_both if c.K > 1 else Spec("batch")
    by_batch = lambda x: Spec("batch") if len(x) > 1 else Spec()
    by_head = lambda part: jax.tree.map(lambda x: Spec("heads") if len(x) > 1 else Spec(), part)
    spec = dataclasses.replace(
        jax.tree.map(by_batch, pattern), blocks=by_head(pattern.blocks),
        elements=by_head(pattern.elements),
    )  # fmt: skip
    specs = [by_both, kv, kv] * 2

    def step(arrays, pattern, do):
        return attend_and_pull(arrays, pattern, do, c.scale, "xla")

    spread = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, spec, by_both), out_specs=(by_both, tuple(specs))
    )
    got = jax.jit(spread)([*qkv, *projected], pattern, do)
    want = run(c, "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, 1e-5, name)


@BOTH
def test_what_is_invalid_under_jit_is_nan_in_that_sample_alone(implementation):
    c = case("longformer")
    q, k, v, _, do = c.inputs()

    @jax.jit
    def step(positions):
        pattern = compound.longformer(c.T, window=4, positions=positions)
        return attend_and_pull([q, k, v], pattern, do, None, implementation)

    good, bad = step(jnp.asarray(SCATTERED)), step(jnp.asarray(SCATTERED).at[1, 0].set(c.T))
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(bad), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert np.isfinite(a).all()
        assert np.isnan(b[1]).all()


def temporary_bytes(seq_len, implementation):
    q, k, v = (jax.ShapeDtypeStruct((1, seq_len, 2, 16), jnp.float32) for _ in range(3))
    pattern = compound.longformer(seq_len, window=64, positions=np.arange(0, 1024, 32)[None])
    step = jax.jit(loss_of(implementation)).lower(q, k, v, pattern).compile()
    return step.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = temporary_bytes(4096, "xla"), temporary_bytes(8192, "xla")
    dense = temporary_bytes(4096, "reference")
    assert long < 2.2 * short
    assert dense > 4096 * 4096 * 4  # the measure sees a dense map
    assert short < dense / 8


def array(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


PATTERN = compound.longformer(32, window=2, positions=np.array([[1, 5]]))
HEADS = functools.partial(CompoundPattern.from_parts, 32)
OUTSIDE = jax.jit(lambda x: compound.longformer(32, window=2, positions=x))(jnp.full((1, 1), 99))
REFUSED = {
    "pattern_type": ({"pattern": patterns.full(32, block=16)}, "CompoundPattern.*BlockPattern"),
    "stacked": ({"pattern": stack([PATTERN] * 2)}, "must be single.*stacked"),
    "length": ({"q": array(2, 24, 4, 8)}, "seq_len=32; got q of length 24"),
    "kv_length": ({"k": array(2, 40, 2, 8)}, "k of length 40"),
    "batch": (
        {"pattern": compound.longformer(32, window=2, positions=np.zeros((3, 1), int))},
        r"batch must be 1 or that of q, B=2; got \[3\]",
    ),
    "heads": (
        {"pattern": HEADS(elements=compound.random_elements(32, keys_per_query=1, heads=3))},
        r"heads P of blocks and elements.*got \[3\]",
    ),
    "heads_disagree": (
        {"pattern": HEADS(
            elements=compound.random_elements(32, keys_per_query=1, heads=2),
            blocks=patterns.random(32, blocks_per_row=1, heads=4, block=8))},
        r"and agree; got \[2, 4\]",
    ),
    "invalid": ({"pattern": OUTSIDE}, "not valid: positions were outside"),
    "one_projection": ({"q_global": array(2, 2, 4, 8)}, "must be given together"),
    "projection_shape": (
        {n: array(2, 32, 2, 8) for n in NAMES}, r"q_global is a projection of pattern.take_rows",
    ),
    "projection_dtype": (
        {"q_global": array(2, 2, 4, 8, dtype="bfloat16"), "k_global": array(2, 32, 2, 8),
         "v_global": array(2, 32, 2, 8)}, "must have q's dtype float32; got .*bfloat16",
    ),
    "implementation": ({"implementation": "cuda"}, "implementation must be one of"),
}  # fmt: skip


def call(q=None, k=None, pattern=PATTERN, **options):
    q = array(2, 32, 4, 8) if q is None else q
    k = array(2, 32, 2, 8) if k is None else k
    return compound_attention(q, k, k, pattern, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(**options)
