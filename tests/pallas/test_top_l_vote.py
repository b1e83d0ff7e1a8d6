"""The kernel that counts votes finds the very numbers of the portable ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import pallas, top_l_blocks
from sparsax.nn import TopLAttention
from sparsax.pallas.top_l import walk
from sparsax.patterns import topl
from sparsax.quantise import Codes
from tests.helpers import assert_near, launched
from tests.pallas.test_top_l_lowering import inputs
from tests.pallas.test_top_l_select import LARGE, MATCH
from tests.pallas.test_top_l_select import check as check_integers
from tests.top_l_cases import Case

INTERPRETED = (
    (MATCH["mqa"], 32, 8),
    (MATCH["two_words"], 32, 2),
    (MATCH["one_key"], 32, 32),
    (MATCH["padding"], 32, 4),
    (Case(name="all_keys", T=72, N=1, K=1, keep=72, padding="some"), 64, 4),
    (Case(name="a_tile_beside_keys_of_many", B=1, T=400, N=2, K=1, keep=30), 128, 32),
    (Case(name="holes", T=150, N=1, K=1, keep=20, padding="holes"), 64, 64),
    (Case(name="bidirectional", B=2, T=200, N=1, K=1, keep=21, causal=False, padding="all"), 64, 8),
)
SHAPES = [(case, block, voters) for case in LARGE for block, voters in ((64, 8), (128, 128))]


@functools.partial(jax.jit, static_argnums=2)
def by_kernel(codes, key_mask, options):
    return pallas.top_l.votes(codes, key_mask, interpret=pallas.interpret(), **dict(options))


def check(c, block, voters):
    *_, codes, key_mask = c.inputs()
    by_kernel.clear_cache()  # a trace keeps whether it was to be interpreted
    options = {"keep": c.keep, "block": block, "stride": block // voters, "causal": c.causal}
    got = by_kernel(codes, key_mask, tuple(options.items()))
    count = jax.jit(topl.votes, static_argnames=tuple(options))
    want = count(codes, key_mask=key_mask, **options)
    assert got.dtype == want.dtype
    assert int(want.max()) > 1
    np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(("c", "block", "voters"), INTERPRETED, ids=lambda x: getattr(x, "name", x))
def test_interpreted_kernel_counts_the_portable_votes(c, block, voters):
    with pallas.interpreted(detect_races=True):
        check(c, block, voters)


@pytest.mark.usefixtures("no_races", "fresh")
@pytest.mark.parametrize("parts", [1, 2])
def test_fewer_warpgroups_walk_the_keys_where_there_are_many_queries(parts, monkeypatch):
    padding, two_tiles = MATCH["padding"], Case(name="two_tiles", B=1, T=200, N=4, K=1, keep=21)
    monkeypatch.setattr(walk, "BUSY", 16 * (parts - 1))  # both have 8 row tiles
    monkeypatch.setattr(walk, "multiprocessors", lambda: 1)
    for c, stride in ((padding, 8), (two_tiles, 1)):
        *_, codes, key_mask = c.inputs()
        assert walk.Walked.of(codes, key_mask, c.keep, c.causal, stride).parts == parts
    with pallas.interpreted(detect_races=True):
        check(padding, 32, 4)
        check_integers(two_tiles)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("c", "block", "voters"), [*INTERPRETED, *SHAPES], ids=lambda x: getattr(x, "name", x)
)
def test_kernel_counts_the_portable_votes(c, block, voters):
    check(c, block, voters)


def test_patterns_of_the_kernel_under_vmap_are_the_portable_ones():
    each = [Case(name=str(i), B=1, T=72, N=2, K=1).inputs()[4] for i in range(2)]
    codes = jax.tree.map(lambda *x: jnp.stack(x), *each)
    static = {"keep": 20, "block": 32, "voters": 4, "causal": True}
    with pallas.interpreted():
        choose = lambda codes: top_l_blocks(codes, **static, implementation="pallas")
        got = jax.jit(jax.vmap(choose))(codes)
    for i, one in enumerate(each):
        want = top_l_blocks(one, **static, implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], got), want)


def layer(**options):
    return TopLAttention(
        4, 256, keep=128, select="blocks", causal=True, num_kv_heads=2, dtype=jnp.bfloat16,
        use_bias=False, rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


@nnx.jit
def gradients(model, x):
    return nnx.value_and_grad(lambda model: (model(x).astype(jnp.float32) ** 2).mean())(model)


@pytest.mark.usefixtures("one_multiprocessor")
def test_a_layer_and_its_gradient_lower_to_kernels():
    x = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16)
    graph, state = nnx.split(layer(implementation="pallas"))

    def loss(state, x):
        return gradients(nnx.merge(graph, state), x)

    with pallas.lowering():
        text = jax.jit(loss).trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 1 + 5  # rows are dealt out for forward and dq together, and for dkv
    for kernel in ("top_l_vote", "block_sparse_forward", "block_sparse_dkv"):
        assert kernel in text


@pytest.mark.gpu
def test_a_layer_on_the_kernels_is_the_portable_one():
    x = jax.random.normal(jax.random.key(1), (3, 1000, 256), jnp.bfloat16)
    found = [gradients(layer(implementation=name), x) for name in ("pallas", "xla")]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert_near(a.astype(jnp.float32), b.astype(jnp.float32), 2e-2, "gradient")


@pytest.mark.parametrize(
    ("block", "num_codes", "message"),
    [(16, 8, r"takes blocks of \(32, 64, 128\); got 16"), (64, 17, "at most 16 codes.*got 17")],
)
def test_what_the_kernel_cannot_do_names_what_can(block, num_codes, message):
    words = jnp.zeros((1, 128, 2, -(-num_codes // 8)), jnp.uint32)
    codes = Codes(words, words, num_codes)
    with pallas.lowering():
        with pytest.raises(NotImplementedError, match=message + ".*'xla' runs"):
            top_l_blocks(codes, keep=9, block=block, implementation="pallas")
        assert bool(top_l_blocks(codes, keep=9, block=block).valid().all())


@pytest.mark.skipif(pallas.on_hopper(), reason="the kernel does run here")
def test_without_a_gpu_the_kernel_refuses():
    codes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs()[3])
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs"):
        top_l_blocks(codes, keep=9, implementation="pallas")
