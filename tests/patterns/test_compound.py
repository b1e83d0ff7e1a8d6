import numpy as np
import pytest

from sparsax import patterns
from sparsax.patterns import compound

T = 40
GAP = np.arange(T) - np.arange(T)[:, None]


def cross(tokens):
    """True in the rows and columns of the tokens."""
    chosen = np.isin(np.arange(T), tokens)
    return chosen[:, None] | chosen


def assert_pairs(pattern, *want):
    assert pattern.seq_len == T
    np.testing.assert_array_equal(pattern.to_mask()[:, 0], np.stack(want))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_longformer(causal, dilation):
    pattern = compound.longformer(
        T, window=4, positions=np.array([[0, 30, 17], [5, 0, 0]]), counts=np.array([3, 1]),
        dilation=dilation, causal=causal,
    )  # fmt: skip
    window = (abs(GAP) <= 4 * dilation) & (GAP % dilation == 0)
    seen = GAP <= 0 if causal else True
    assert_pairs(pattern, *((window | cross(tokens)) & seen for tokens in ([0, 17, 30], [5])))


def test_longformer_is_a_window_without_global_tokens_and_zero_in_padding():
    real = np.arange(T) < 33
    pattern = compound.longformer(T, window=100, token_mask=real[None])
    assert_pairs(pattern, real[:, None] & real)


def test_qds_takes_the_query_and_what_precedes_each_sentence():
    pattern = compound.qds(
        T, window=2, query_lens=np.array([4, 6]), max_query_len=6,
        sentence_starts=np.array([[4, 20, 31], [6, 25, 39]]), num_sentences=np.array([3, 2]),
    )  # fmt: skip
    window = abs(GAP) <= 2
    want = [[0, 1, 2, 3, 4, 20, 31], [0, 1, 2, 3, 4, 5, 6, 25]]
    assert_pairs(pattern, *(window | cross(tokens) for tokens in want))


def test_etc_has_its_global_tokens_in_front():
    assert_pairs(compound.etc(T, window=3, num_global=5), (abs(GAP) <= 3) | cross(np.arange(5)))


@pytest.mark.parametrize(("seq_len", "heads"), [(512, 1), (500, 3)])
def test_bigbird_is_the_block_pattern_with_its_global_rows_apart(seq_len, heads):
    pattern = compound.bigbird(seq_len, block=32, heads=heads, seed=4)
    want = patterns.bigbird(seq_len, block=32, heads=heads, seed=4)
    np.testing.assert_array_equal(pattern.to_mask()[0], want.to_mask())
    assert pattern.blocks.kv_indices.shape[-1] <= 3 + 2 + 3


@pytest.mark.parametrize("seq_len", [512, 500])
def test_bigbird_with_global_blocks_at_both_ends(seq_len):
    options = {"block": 32, "global_blocks": (1, 2), "heads": 2, "seed": 3}
    pattern = compound.bigbird(seq_len, **options)
    whole = patterns.bigbird(seq_len, **options)
    np.testing.assert_array_equal(pattern.to_mask()[0], whole.to_mask())
    i = np.arange(16)
    ends = (i < 1) | (i >= 14)
    fixed = (abs(i - i[:, None]) <= 1) | ends | ends[:, None]
    mask = np.asarray(whole.to_block_mask())
    assert mask[:, fixed].all()
    np.testing.assert_array_equal((mask & ~fixed).sum(-1), np.broadcast_to(3 * ~ends, (2, 16)))
    tokens = np.arange(seq_len)
    np.testing.assert_array_equal(pattern.is_row()[0], (tokens < 32) | (tokens >= 14 * 32))
    assert pattern.blocks.kv_indices.shape[-1] <= 3 + 3 + 3


def test_vertical_slash():
    pattern = compound.vertical_slash(
        T, columns=np.array([[0, 12]]), offsets=[5, 0, 16, 1], causal=False
    )
    assert_pairs(pattern, np.isin(-GAP, [0, 1, 5, 16]) | np.isin(np.arange(T), [0, 12]))
    assert len(pattern.bands) == 3


@pytest.mark.parametrize("causal", [False, True])
def test_strided(causal):
    pairs = (abs(GAP) <= 7) | (GAP % 7 == 0)
    assert_pairs(
        compound.strided(T, stride=7, causal=causal), pairs & (GAP <= 0 if causal else True)
    )


def test_random_elements_hold_the_number_asked_for_and_repeat():
    draw = lambda seed: compound.random_elements(T, keys_per_query=6, heads=2, seed=seed).to_mask()
    np.testing.assert_array_equal(draw(0).sum(-1), 6)
    np.testing.assert_array_equal(draw(0), draw(0))
    assert bool((draw(0)[0] != draw(0)[1]).any())
    assert bool((draw(0) != draw(1)).any())


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    with pytest.raises(ValueError, match="window is one-sided and must be at least 0; got -1"):
        compound.longformer(T, window=-1)
    with pytest.raises(ValueError, match="stride must be at least 1 token; got 0"):
        compound.strided(T, stride=0)
    starts = np.array([[4]])
    with pytest.raises(ValueError, match=r"max_query_len must hold the longest query, 5.*got 4"):
        compound.qds(T, window=2, query_lens=np.array([5]), max_query_len=4, sentence_starts=starts)
