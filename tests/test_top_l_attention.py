import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import top_l_attention
from sparsax.patterns import topl
from sparsax.quantise import Codes
from tests.helpers import assert_near
from tests.top_l_cases import CASES, case, plain_scores, plain_top_l

BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
SOME = pytest.mark.parametrize("name", ["gqa", "padding", "several_tiles"])


@functools.partial(jax.jit, static_argnums=6)
def attend_and_pull(q, k, v, do, codes, key_mask, static):
    attend = lambda q, k, v: top_l_attention(q, k, v, codes, key_mask=key_mask, **dict(static))
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)


def value_and_gradients(c, implementation, dtype=None, inputs=None):
    q, k, v, do, codes, key_mask = c.inputs() if inputs is None else inputs
    q, k, v, do = (x.astype(dtype or c.dtype) for x in (q, k, v, do))
    static = tuple((c.static | {"implementation": implementation}).items())
    return attend_and_pull(q, k, v, do, codes, key_mask, static)


@BY_NAME
def test_values_and_gradients_match_the_float32_reference(c):
    o, gradients = value_and_gradients(c, "xla")
    want, expected = value_and_gradients(c, "reference", "float32")
    assert o.dtype == jnp.dtype(c.dtype)
    assert_near(o, want, c.tolerance.output, "o")
    for name, got, other in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert got.dtype == jnp.dtype(c.dtype)
        if name != "dv" and c.keep == 1:  # softmax over one key is constant: both are rounding
            assert float(jnp.abs(got).max()) < 1e-5
        else:
            assert_near(got, other, c.tolerance.gradient, name)


@pytest.mark.parametrize(
    ("implementation", "name"), [("reference", "padding"), ("xla", "gqa"), ("xla", "several_tiles")]
)
def test_attention_is_a_softmax_over_plainly_chosen_keys(implementation, name):
    c = case(name)
    q, k, v, _, codes, key_mask = c.inputs()
    scores = plain_scores(codes)
    o = np.asarray(value_and_gradients(c, implementation)[0])
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, n in np.ndindex(c.B, c.N):
        real = None if key_mask is None else np.asarray(key_mask[b])
        kept = plain_top_l(scores[b, n], c.keep, causal=c.causal, real=real)
        m = n // (c.N // c.K)
        p = np.where(kept, np.exp(q[b, :, n] @ k[b, :, m].T / np.sqrt(c.H)), 0.0)
        want = p @ v[b, :, m] / np.maximum(p.sum(-1, keepdims=True), 1e-300)
        assert_near(o[b, :, n], want, 1e-5, f"sample {b} head {n}")


@pytest.mark.parametrize("causal", [False, True])
def test_keeping_all_keys_is_dense_attention(causal):
    q, k, v, _, codes, _ = case("gqa").inputs()
    o = top_l_attention(q, k, v, codes, keep=72, causal=causal)
    assert_near(o, jax.nn.dot_product_attention(q, k, v, is_causal=causal), 1e-5, "o")


def test_a_query_without_keys_has_zero_output_and_gradients():
    o, (dq, dk, dv) = value_and_gradients(case("padding_all"), "xla")
    for x in (o, dq, dk, dv):
        np.testing.assert_array_equal(x[-1], 0.0)
        assert float(jnp.abs(x[0]).min()) > 0


def test_large_logits_do_not_overflow():
    q, k, v, _, codes, _ = case("adc").inputs()
    attend = lambda name: top_l_attention(300 * q, k, v, codes, keep=9, implementation=name)
    assert_near(attend("xla"), attend("reference"), 1e-3, "o")


@SOME
def test_two_runs_give_the_same_bits(name):
    chex.assert_trees_all_equal(*(value_and_gradients(case(name), "xla") for _ in range(2)))


def loss_of(c, implementation="xla"):
    def loss(q, k, v, codes, key_mask=None):
        o = top_l_attention(
            q, k, v, codes, key_mask=key_mask, **c.static, implementation=implementation
        )
        return jnp.sum(jnp.sin(3 * o))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("name", ["match", "gqa"])
def test_vmap_over_everything(name):
    c = case(name)
    each = [c.inputs(seed) for seed in range(2)]
    pick = lambda x: (*x[:3], x[4])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(pick, each))
    got = jax.jit(jax.vmap(loss_of(c)))(*stacked)
    for n, inputs in enumerate(each):
        want = loss_of(c, "reference")(*pick(inputs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_near(a[n], b, 2e-5, f"sample {n}")


def test_scan_over_layers_and_checkpoint():
    c = case("match")
    layers = [c.inputs(seed) for seed in range(3)]
    _, k, v, *_ = layers[0]
    codes = jax.tree.map(lambda *x: jnp.stack(x), *(x[4] for x in layers))

    def layer(x, codes, implementation):
        return x + top_l_attention(x, k, v, codes, **c.static, implementation=implementation), None

    def scanned(x):
        step = functools.partial(layer, implementation="xla")
        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, codes)[0] ** 2)

    def looped(x):
        for inputs in layers:
            x, _ = layer(x, inputs[4], "reference")
        return jnp.sum(x**2)

    got, want = (jax.jit(jax.value_and_grad(f))(layers[0][0]) for f in (scanned, looped))
    assert_near(got[0], want[0], 1e-5, "loss")
    assert_near(got[1], want[1], 1e-5, "gradient")


@pytest.mark.parametrize("name", ["padding", "mqa"])
def test_shard_map_over_batch_and_heads(name):
    c = dataclasses.replace(case(name), N=4)
    inputs = c.inputs()
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "heads"))
    both = Spec("batch", None, "heads")
    kv = both if c.K > 1 else Spec("batch")  # one kv head is replicated, its gradients add up
    codes = Codes(both, kv, num_codes=inputs[4].num_codes)
    mask = None if inputs[5] is None else Spec("batch")
    static = tuple((c.static | {"implementation": "xla"}).items())
    spread = jax.shard_map(
        lambda *x: attend_and_pull(*x, static), mesh=mesh,
        in_specs=(both, kv, kv, both, codes, mask), out_specs=(both, (both, kv, kv)),
    )  # fmt: skip
    got = jax.jit(spread)(*inputs)
    want = value_and_gradients(c, "reference", inputs=inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, 1e-5, name)


def test_new_codes_do_not_compile_again():
    c = case("gqa")
    run = jax.jit(loss_of(c))
    losses = []
    for seed in range(3):
        q, k, v, _, codes, _ = c.inputs(seed)
        losses.append(float(run(q, k, v, codes)[0]))
    assert run._cache_size() == 1
    assert len(set(losses)) == 3


def temporary_bytes(length, implementation, score="match"):
    c = case("match")
    shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
    q = shape(1, length, 2, 16)
    words = jax.ShapeDtypeStruct((1, length, 2, 1), jnp.uint32)
    tables = jax.ShapeDtypeStruct((1, length, 2, 2, 16), jnp.uint8)
    codes = Codes(words if score == "match" else tables, words, num_codes=2)
    run = jax.jit(loss_of(c, implementation))
    return run.lower(q, q, q, codes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("score", ["match", "adc"])
def test_memory_grows_with_the_length_and_not_with_its_square(score):
    short, long = (temporary_bytes(length, "xla", score) for length in (2048, 4096))
    dense = temporary_bytes(2048, "reference", score)
    assert long < 2.2 * short
    assert dense > 2 * 2048 * 2048 * 4  # the measure sees a dense map
    assert short < dense / 4


def test_only_arrays_of_the_length_are_kept_for_the_backward_pass():
    c = case("several_tiles")
    q, k, v, _, codes, _ = c.inputs()
    _, pull = jax.vjp(lambda q, k, v: top_l_attention(q, k, v, codes, **c.static), q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= q.size


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_values_and_gradients_lower_elsewhere(platform):
    c = case("bf16_adc")
    q, k, v, _, codes, _ = c.inputs()
    step = jax.jit(loss_of(c))
    assert "while" in step.trace(q, k, v, codes).lower(lowering_platforms=(platform,)).as_text()


def other(**changes):
    c = case("match")
    q, k, v, _, codes, _ = c.inputs()
    arguments = {"q": q, "k": k, "v": v, "codes": codes, "keep": 9} | changes
    return top_l_attention(**arguments)


REFUSED = {
    "codes": (lambda: other(codes=None), r"ProductQuantizer.codes\(q, k\); got NoneType"),
    "keep": (lambda: other(keep=0), r"keep must lie within \[1, S=72\]; got 0"),
    "long": (lambda: other(keep=73), r"keep must lie within \[1, S=72\]; got 73"),
    "mask": (
        lambda: other(key_mask=jnp.ones((2, 71), bool)),
        r"key_mask must be boolean \[B, S\]=\(2, 72\).*got bool \(2, 71\)",
    ),
    "foreign": (
        lambda: other(codes=case("mqa").inputs()[4]),
        r"codes must be those of these q and k.*got codes of \(2, 72, 3\)",
    ),
    "cross": (
        lambda: topl.tokens(
            Codes(*(jnp.zeros((1, n, 1, 1), jnp.uint32) for n in (4, 5)), 2), keep=1
        ),
        "T must be S; got T=4 and S=5",
    ),
    "name": (lambda: other(implementation="cuda"), "implementation must be one of .*got 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_pallas_is_refused_by_a_name_that_runs():
    with pytest.raises(NotImplementedError, match=r"takes q, k, v in one of.*'xla' runs this"):
        other(implementation="pallas")
