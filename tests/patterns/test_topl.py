import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsax
from sparsax.patterns import quality, topl
from sparsax.quantise import Codes
from sparsax.quantise.codes import pack
from tests.helpers import assert_near
from tests.top_l_cases import case, plain_scores, plain_top_l

SIZE, BLOCK = 24, 4
mask_of = jax.jit(
    lambda codes, key_mask, keep, causal: topl.tokens(
        codes, keep=keep, causal=causal, key_mask=key_mask
    ).to_mask(),
    static_argnums=(2, 3),
)


def drawn(seed, score, length=SIZE, kv_heads=1, heads=2, centroids=3, num_codes=3):
    """Codes with many ties, those of tables as well."""
    rng = np.random.default_rng(seed)
    draw = lambda *x: jnp.asarray(rng.integers(0, centroids, x), jnp.uint8)
    keys = pack(draw(1, length, kv_heads, num_codes))
    queries = pack(draw(1, length, heads, num_codes))
    if score == "adc":
        queries = draw(1, length, heads, num_codes, 16)
    return Codes(queries, keys, num_codes=num_codes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), score=st.sampled_from(["match", "adc"]),
    keep=st.sampled_from([1, 2, 7, SIZE]), causal=st.booleans(), padded=st.booleans(),
)  # fmt: skip
def test_tokens_are_the_plain_top_l(seed, score, keep, causal, padded):
    codes = drawn(seed, score)
    real = np.random.default_rng(seed).random((1, SIZE)) < (0.6 if padded else 1.0)
    got = np.asarray(mask_of(codes, jnp.asarray(real), keep, causal))
    scores = plain_scores(codes)
    for n in range(2):
        want = plain_top_l(scores[0, n], keep, causal=causal, real=real[0])
        np.testing.assert_array_equal(got[0, n], want)


@pytest.mark.parametrize("name", ["several_tiles", "gqa", "two_words"])
def test_tokens_of_real_codes_over_several_tiles(name):
    c = case(name)
    codes, key_mask = c.inputs()[4:]
    got = np.asarray(mask_of(codes, key_mask, c.keep, c.causal))
    for b, n in np.ndindex(c.B, c.N):
        want = plain_top_l(plain_scores(codes)[b, n], c.keep, causal=c.causal)
        np.testing.assert_array_equal(got[b, n], want)
    np.testing.assert_array_equal(got.sum(-1)[0, 0], np.minimum(np.arange(c.T) + 1, c.keep))


def test_equal_scores_keep_the_most_recent_keys():
    codes = drawn(0, "match", centroids=1)
    got = np.asarray(mask_of(codes, None, 5, True))[0, 0]
    i, j = np.arange(SIZE)[:, None], np.arange(SIZE)
    np.testing.assert_array_equal(got, (j <= i) & (j > i - 5))


def plain_blocks(codes, keep, causal, real, voters=None):
    """`[K, I, J]` by votes of the plain top-L, then a sort by (own, sink, votes, position)."""
    stride = BLOCK // (voters or BLOCK)  # of so few the default is all
    scores, group = plain_scores(codes)[0], codes.queries.shape[2] // codes.keys.shape[2]
    num = -(-scores.shape[1] // BLOCK)
    votes = np.zeros((len(scores) // group, num, num), int)
    for n in range(len(scores)):
        kept = plain_top_l(scores[n], keep, causal=causal, real=real)
        for i, j in zip(*np.nonzero(kept), strict=True):
            votes[n // group, i // BLOCK, j // BLOCK] += real[i] and i % stride == 0
    listed = np.zeros(votes.shape, bool)
    for h, i in np.ndindex(votes.shape[:2]):
        seen = [j for j in range(num) if j <= i or not causal]
        seen.sort(key=lambda j: (j in (0, i), votes[h, i, j], j), reverse=True)
        listed[h, i, seen[: max(2, -(-keep // BLOCK))]] = True
    return listed


blocks_of = jax.jit(
    lambda codes, key_mask, keep, causal, voters=None: sparsax.top_l_blocks(
        codes, keep=keep, block=BLOCK, causal=causal, key_mask=key_mask, voters=voters
    ),
    static_argnums=(2, 3, 4),
)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), score=st.sampled_from(["match", "adc"]),
    keep=st.sampled_from([1, 9, 22]), causal=st.booleans(), length=st.sampled_from([22, 24]),
    voters=st.sampled_from([None, 1, 2]),
)  # fmt: skip
def test_blocks_are_those_of_plain_votes(seed, score, keep, causal, length, voters):
    codes = drawn(seed, score, length=length, kv_heads=2, heads=4)
    real = np.random.default_rng(seed).random(length) < 0.8
    pattern = blocks_of(codes, jnp.asarray(real)[None], keep, causal, voters)
    np.testing.assert_array_equal(
        pattern.to_block_mask()[0], plain_blocks(codes, keep, causal, real, voters)
    )


def test_blocks_run_on_block_sparse_attention_without_a_new_compilation():
    c = dataclasses.replace(case("gqa"), T=64)

    @jax.jit
    def attend(q, k, v, codes):
        pattern = sparsax.top_l_blocks(codes, keep=24, block=8, causal=True)
        one = lambda q, k, v, pattern: sparsax.block_sparse_attention(
            q[None], k[None], v[None], pattern, causal=True
        )[0]
        return jax.vmap(one)(q, k, v, pattern), pattern

    for seed in range(2):
        q, k, v, _, codes, _ = c.inputs(seed)
        o, pattern = attend(q, k, v, codes)
        assert pattern.kv_indices.shape == (2, 2, 8, 3)
        assert bool(pattern.valid().all())
        np.testing.assert_array_equal(
            pattern.kv_num_blocks, np.broadcast_to([1, 2, *[3] * 6], (2, 2, 8))
        )
        for b, each in enumerate(pattern.unstack()):
            cut = slice(b, b + 1)
            want = sparsax.block_sparse_attention(
                q[cut], k[cut], v[cut], each, causal=True, implementation="reference"
            )
            assert_near(o[cut], want, 1e-5, "o")
    assert attend._cache_size() == 1


def test_vmap_over_codes():
    each = [drawn(seed, "match") for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    masks = jax.vmap(lambda c: topl.tokens(c, keep=5, causal=True).to_mask())(stacked)
    lists = jax.vmap(lambda c: sparsax.top_l_blocks(c, keep=8, block=BLOCK).to_block_mask())(
        stacked
    )
    for n, codes in enumerate(each):
        np.testing.assert_array_equal(masks[n], mask_of(codes, None, 5, True))
        np.testing.assert_array_equal(lists[n], blocks_of(codes, None, 8, False).to_block_mask())


def temporary_bytes(length, select):
    words = jax.ShapeDtypeStruct((1, length, 2, 1), jnp.uint32)
    run = jax.jit(lambda codes: select(codes, keep=64, causal=True))
    compiled = run.lower(Codes(words, words, num_codes=8)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("select", [topl.tokens, sparsax.top_l_blocks])
def test_memory_is_that_of_one_tile_of_queries(select):
    short, long = (temporary_bytes(length, select) for length in (2048, 4096))
    assert long < 2.2 * short
    assert long < 4096 * 4096 * 4 / 3


def test_a_sequence_beyond_int32_is_refused():
    length = 2**20
    words, tables = (1, length, 1, 2), (1, length, 1, 16, 16)
    codes = Codes(
        jax.ShapeDtypeStruct(tables, jnp.uint8), jax.ShapeDtypeStruct(words, jnp.uint32), 16
    )
    with pytest.raises(ValueError, match=r"must fit 31 bits: at most 524288 keys.*got 1048576"):
        jax.eval_shape(lambda codes: topl.tokens(codes, keep=4), codes)


@pytest.mark.usefixtures("unchecked")
def test_blocks_longer_than_the_sequence_are_refused():
    with pytest.raises(ValueError, match=r"1 <= block_q <= q_len; got block_q=32 and q_len=24"):
        sparsax.top_l_blocks(drawn(0, "match"), keep=4, block=32)


def test_eight_queries_of_a_block_vote_or_as_many_as_divide_it():
    codes = drawn(0, "match")
    default = lambda block: sparsax.top_l_blocks(codes, keep=4, block=block).to_block_mask()
    for block, voters in ((4, 4), (6, 2), (12, 4)):
        want = sparsax.top_l_blocks(codes, keep=4, block=block, voters=voters).to_block_mask()
        np.testing.assert_array_equal(default(block), want)
    assert topl.voting_stride(64, None) == 8


@pytest.mark.parametrize("voters", [0, 3, 4.0, True])
@pytest.mark.usefixtures("unchecked")
def test_voters_that_do_not_divide_a_block_are_refused(voters):
    with pytest.raises(ValueError, match=f"divides the 8 queries .*; got {voters}. voters=8"):
        sparsax.top_l_blocks(drawn(0, "match"), keep=4, block=8, voters=voters)


def test_quality_of_a_choice():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 16, 2, 8))
    probs = quality.probabilities(q, k, causal=True)
    want = jax.nn.softmax(
        jnp.where(np.tri(16, dtype=bool), jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5, -jnp.inf)
    )
    assert_near(probs, want, 1e-5, "probabilities")
    best = quality.exact(probs, 4)
    np.testing.assert_array_equal(best.sum(-1)[0, 0], np.minimum(np.arange(16) + 1, 4))
    largest = np.sort(np.asarray(probs), -1)[..., -4:].sum(-1)
    assert_near(quality.captured_mass(best, probs), largest.mean(), 1e-6, "mass")
    assert float(quality.recall(best, probs, 4)) == 1.0
    near = quality.window(16, 4, causal=True)
    i, j = np.arange(16)[:, None], np.arange(16)
    np.testing.assert_array_equal(near, (j <= i) & (j > i - 4))
    both = np.asarray(best[0, 0] & near).sum(-1) / np.minimum(np.arange(16) + 1, 4)
    assert_near(quality.recall(near, probs[:, :1], 4), both.mean(), 1e-6, "recall")
    np.testing.assert_array_equal(quality.window(16, 4)[8], (j >= 7) & (j <= 10))


def test_numbers_of_31_bits_are_told_apart():
    scores = np.random.default_rng(0).integers(0, 2**26 - 1, (5, 32)).astype(np.int32)
    tau, first = (np.asarray(x)[:, None] for x in topl._best(jnp.asarray(scores), 7, 2**26 - 1))
    kept = (scores > tau) | ((scores == tau) & (np.arange(32) >= first))
    for row, best in zip(kept, scores, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(best)[-7:])
