"""Every refusal of a bad argument, by its message."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import BlockPattern, block_sparse_attention, patterns, score_map
from sparsax.patterns import mass, spion

pytestmark = pytest.mark.usefixtures("unchecked")

PATTERN = patterns.causal(64, block=16)
from_mask = functools.partial(BlockPattern.from_block_mask, q_len=64, block_q=16)
from_indices = functools.partial(BlockPattern.from_indices, q_len=32, block_q=16)


def array(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


def attend(q=None, k=None, v=None, pattern=PATTERN, **options):
    q = array(2, 64, 4, 8) if q is None else q
    k = array(2, 64, 2, 8) if k is None else k
    return block_sparse_attention(q, k, k if v is None else v, pattern, **options)


def lists(counts, indices):
    return {"kv_num_blocks": np.array([counts]), "kv_indices": np.array([indices])}


OVERFLOWN = jax.jit(lambda mask: from_mask(mask, kv_width=1))(jnp.ones((4, 4), bool))
NAN_SEARCHED = jax.jit(lambda m: spion.search(m, block=16))(jnp.full((64, 64), jnp.nan))
NOISE = np.random.default_rng(0).random((64, 64)).astype(np.float32)

ATTENTION = {
    "q_of_three_axes": ({"q": array(64, 4, 8)}, r"q must be \[B, T, N, H\]"),
    "k_of_three_axes": ({"k": array(64, 2, 8)}, r"q must be \[B, T, N, H\]"),
    "v_unlike_k": ({"v": array(2, 64, 2, 4)}, "k and v must have one shape"),
    "batch": ({"k": array(3, 64, 2, 8)}, "must agree in batch B and head features H"),
    "features": ({"k": array(2, 64, 2, 4)}, "must agree in batch B and head features H"),
    "heads": ({"k": array(2, 64, 3, 8)}, "N must be a multiple of the kv heads K.*N=4 and K=3"),
    "no_kv_heads": ({"k": array(2, 64, 0, 8)}, "N must be a multiple of the kv heads K"),
    "integers": (
        {n: array(2, 64, 4, 8, dtype="int32") for n in "qk"},
        "share one dtype.*got int32",
    ),
    "mixed_dtypes": ({"k": array(2, 64, 2, 8, dtype="bfloat16")}, "share one dtype.*bfloat16"),
    "float64": ({n: np.ones((2, 64, 4, 8)) for n in "qk"}, "share one dtype.*got float64"),
    "no_pattern": ({"pattern": np.ones((4, 4), bool)}, "must be a sparsax.BlockPattern.*ndarray"),
    "stacked": ({"pattern": BlockPattern.stack([PATTERN] * 2)}, "must be single.*stacked one"),
    "q_len": ({"q": array(2, 48, 4, 8)}, "pattern is for q_len=64, kv_len=64; got q of length 48"),
    "kv_len": ({"k": array(2, 80, 2, 8)}, "pattern is for q_len=64.*k of length 80"),
    "pattern_heads": (
        {"pattern": patterns.random(64, blocks_per_row=1, heads=3, block=16)},
        "heads P must be 1, K=2 or N=4 .*got P=3",
    ),
    "pattern_heads_between": (
        {
            "q": array(1, 64, 12, 8),
            "k": array(1, 64, 6, 8),
            "pattern": patterns.random(64, blocks_per_row=1, heads=4, block=16),
        },
        "heads P must be 1, K=6 or N=12 .*got P=4",
    ),
    "overflown": ({"pattern": OVERFLOWN}, "pattern is not valid: a list overflowed"),
    "invalidated": ({"pattern": PATTERN.invalidate(np.array([True]))}, "pattern is not valid"),
    "searched_in_nan": ({"pattern": NAN_SEARCHED}, "pattern is not valid"),
    "window_negative": ({"window": (-1, 0)}, r"window must be .*got \(-1, 0\)"),
    "window_int": ({"window": 4}, "window must be .*got 4"),
    "window_list": ({"window": [4, 4]}, r"window must be .*got \[4, 4\]"),
    "window_three": ({"window": (1, 2, 3)}, "window must be"),
    "window_boolean": ({"window": (True, None)}, "window must be"),
    "window_float": ({"window": (1.0, None)}, "window must be"),
    "pruned": ({"pruned": "keep"}, r"pruned must be one of \('drop', 'zero'\); got 'keep'"),
    "implementation": ({"implementation": "cuda"}, "implementation must be one of .*'cuda'"),
    "segments_shape": (
        {"segment_ids": array(2, 60, dtype="int32")},
        r"segment_ids must be \[B, T\]",
    ),
    "segments_single": (
        {"segment_ids": (array(2, 64, dtype="int32"),)},
        r"segment_ids must be \[B, T\]",
    ),
    "segments_swapped": (
        {
            "k": array(2, 32, 2, 8),
            "pattern": patterns.full(64, 32, block=16),
            "segment_ids": (array(2, 32, dtype="int32"), array(2, 64, dtype="int32")),
        },
        r"segment_ids must be \[B, T\]=\(2, 64\) for queries and \[B, S\]=\(2, 32\)",
    ),
    "segments_one_for_two_lengths": (
        {
            "k": array(2, 32, 2, 8),
            "pattern": patterns.full(64, 32, block=16),
            "segment_ids": array(2, 64, dtype="int32"),
        },
        "one array when T = S, else a pair",
    ),
    "segments_float": ({"segment_ids": array(2, 64)}, "segment_ids must be integers; got float32"),
    "segments_negative": (
        {"segment_ids": -array(2, 64, dtype="int32")},
        "segment_ids must be non-negative",
    ),
    "key_mask_shape": ({"key_mask": array(64, dtype="bool")}, r"key_mask must be boolean \[B, S\]"),
    "key_mask_dtype": ({"key_mask": array(2, 64, dtype="int32")}, "key_mask must be .*got int32"),
}


@pytest.mark.parametrize(("arguments", "message"), ATTENTION.values(), ids=ATTENTION)
def test_attention_refuses(arguments, message):
    attend()  # what is changed below is all that is wrong
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


SHARED = ("q_of_three_axes", "batch", "features", "heads", "mixed_dtypes", "implementation",
          "segments_shape", "segments_float", "key_mask_dtype")  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_score_map_refuses(name):
    arguments, message = ATTENTION[name]
    arguments = {"q": array(2, 64, 4, 8), "k": array(2, 64, 2, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        score_map(**arguments)


@pytest.mark.parametrize("pool", [0, -8, 2.0, True])
def test_score_map_refuses_to_pool_over_no_block(pool):
    with pytest.raises(ValueError, match=f"pool must be None or a block size.*got {pool!r}"):
        score_map(array(2, 64, 4, 8), array(2, 64, 2, 8), pool=pool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (attend, r"'pallas' takes q, k, v in one of .*got float32"),
        (
            lambda **o: score_map(*[array(1, 64, 2, 8)] * 2, **o),
            r"'pallas' takes q, k, v in one of .*got float32",
        ),
    ],
)
def test_pallas_names_what_can_run_instead(call, message):
    with pytest.raises(NotImplementedError, match=message + ".*implementation='xla'"):
        call(implementation="pallas")


LAYOUTS = {
    "block_mask_shape": (
        lambda: from_mask(np.ones((4, 5), bool)),
        r"must end in shape \(4, 4\); got \(4, 5\)",
    ),
    "block_mask_of_one_axis": (lambda: from_mask(np.ones(4, bool)), "must end in shape"),
    "block_mask_dtype": (lambda: from_mask(np.ones((4, 4), int)), "must be boolean; got int64"),
    "length_below_block": (
        lambda: BlockPattern.from_block_mask(np.ones((1, 1), bool), q_len=8, block_q=16),
        "q_len must be at least one block.*block_q=16 and q_len=8",
    ),
    "kv_length_below_block": (
        lambda: from_mask(np.ones((4, 1), bool), kv_len=8),
        "kv_len must be at least one block",
    ),
    "block_of_zero": (lambda: from_mask(np.ones((4, 4), bool), block_q=0), "block_q=0"),
    "width_of_zero": (
        lambda: from_mask(np.eye(4, dtype=bool), kv_width=0),
        r"within \[1, 4\]; got 0",
    ),
    "width_above_all": (
        lambda: from_mask(np.eye(4, dtype=bool), q_width=5),
        r"within \[1, 4\]; got 5",
    ),
    "overflow_of_rows": (
        lambda: from_mask(np.tri(4, dtype=bool), kv_width=3),
        "overflow their capacity: kv_width=3 and q_width=4.*longest lists have 4 and 4",
    ),
    "overflow_of_columns": (
        lambda: from_mask(jnp.tri(4, dtype=bool), q_width=2),
        "kv_width=4 and q_width=2",
    ),
    "element_mask_length": (
        lambda: BlockPattern.from_mask(np.ones((8, 8), bool), block_q=16),
        "at least one block",
    ),
    "indices_shape": (
        lambda: from_indices(**lists([1, 1, 1], [[0], [0], [0]])),
        r"kv_num_blocks must be \[\*L, P, 2\]",
    ),
    "indices_ndim": (
        lambda: from_indices(np.ones((1, 2), int), np.zeros((2, 1), int)),
        "and kv_indices",
    ),
    "indices_descending": (
        lambda: from_indices(**lists([2, 1], [[1, 0], [0, 1]])),
        "must be strictly ascending",
    ),
    "indices_repeated": (
        lambda: from_indices(**lists([2, 1], [[1, 1], [0, 1]])),
        "must be strictly ascending",
    ),
    "indices_above": (lambda: from_indices(**lists([1, 1], [[2], [0]])), r"within \[0, 2\)"),
    "indices_below": (lambda: from_indices(**lists([1, 1], [[-1], [0]])), r"within \[0, 2\)"),
    "count_above_width": (lambda: from_indices(**lists([2, 1], [[0], [0]])), "at most W=1 entries"),
    "count_negative": (lambda: from_indices(**lists([-1, 1], [[0], [0]])), "at most W=1 entries"),
    "union_of_lengths": (lambda: PATTERN | patterns.full(80, block=16), "must agree in lengths"),
    "intersection_of_blocks": (
        lambda: PATTERN & patterns.full(64, block=32),
        "must agree in lengths",
    ),
    "stack_of_none": (lambda: BlockPattern.stack([]), "stack needs at least one pattern"),
    "stack_of_lengths": (
        lambda: BlockPattern.stack([PATTERN, patterns.full(80, block=16)]),
        "stacked patterns must agree",
    ),
    "stack_of_widths": (
        lambda: BlockPattern.stack([PATTERN, from_mask(np.eye(4, dtype=bool), kv_width=2)]),
        "stacked patterns must agree",
    ),
    "unstack_of_single": (PATTERN.unstack, "unstack needs a stacked pattern"),
}

STATIC = {
    "length_below_block": (lambda: patterns.full(8, block=16), "q_len must be at least one block"),
    "window_left": (
        lambda: patterns.sliding_window(64, left=-1, right=0),
        "left must be None or at least 0",
    ),
    "window_right": (
        lambda: patterns.sliding_window(64, left=0, right=-2),
        "right must be .*got -2",
    ),
    "dilated_window": (
        lambda: patterns.dilated(64, window=-1, dilation=1),
        "window must be at least 0",
    ),
    "dilation": (lambda: patterns.dilated(64, window=1, dilation=0), "dilation at least 1 block"),
    "global_above": (
        lambda: patterns.global_tokens(64, positions=[64]),
        r"within \[0, 64\).*got \[64\]",
    ),
    "global_above_keys": (
        lambda: patterns.global_tokens(128, 64, positions=[70]),
        r"within \[0, 64\)",
    ),
    "global_negative": (lambda: patterns.global_tokens(64, positions=[-1]), "positions must lie"),
    "global_nothing": (
        lambda: patterns.global_tokens(64, positions=[0], rows=False, columns=False),
        "rows or columns be True",
    ),
    "random_none": (lambda: patterns.random(64, blocks_per_row=0), "blocks_per_row must lie"),
    "random_many": (
        lambda: patterns.random(64, blocks_per_row=5, block=16),
        r"within \[1, 4\].*got 5",
    ),
    "random_heads": (lambda: patterns.random(64, blocks_per_row=1, heads=0), "heads be at least 1"),
    "bigbird_even": (lambda: patterns.bigbird(64, window_blocks=2), "window_blocks must be odd"),
    "bigbird_negative": (
        lambda: patterns.bigbird(64, random_blocks=-1),
        "random_blocks at least 0",
    ),
    "slash_column": (
        lambda: patterns.vertical_slash(64, columns=[64], offsets=[]),
        r"columns must lie within \[0, 64\)",
    ),
}

SEARCH = {
    "not_square": (lambda: spion.search(NOISE[:, :60]), "must be square"),
    "one_axis": (lambda: spion.search(NOISE[0]), "must be square"),
    "five_axes": (lambda: spion.search(NOISE[None, None, None]), "must be square"),
    "length_below_block": (lambda: spion.search(NOISE, block=65), "at least one block"),
    "variant": (lambda: spion.search(NOISE, variant="FC"), "variant must be 'CF', 'F' or 'C'"),
    "quantile": (lambda: spion.search(NOISE, quantile=1.0), r"quantile must lie within \[0, 1\)"),
    "quantile_negative": (lambda: spion.search(NOISE, quantile=-0.1), "quantile must lie"),
    "density": (lambda: spion.search(NOISE, density=0.0), r"density within \(0, 1\]"),
    "density_above": (lambda: spion.search(NOISE, density=1.1), "density within"),
    "filter_even": (lambda: spion.search(NOISE, filter_length=30), "filter_length must be odd"),
    "filter_negative": (lambda: spion.search(NOISE, filter_length=-1), "filter_length must be odd"),
    "pooled_convolved": (
        lambda: spion.search(NOISE, block=16, length=1024),
        "pooled already: then variant must be 'F'.*got variant='CF'",
    ),
    "pooled_of_another_length": (
        lambda: spion.search(NOISE, block=16, variant="F", length=1000),
        r"maps \[..., 63, 63\], one value for each block of 16 tokens; got \(64, 64\)",
    ),
    "pooled_shorter_than_block": (
        lambda: spion.search(NOISE[:1, :1], block=16, variant="F", length=8),
        "at least one block",
    ),
    "nan": (lambda: spion.search(np.where(NOISE > 0.9, np.nan, NOISE)), "must be finite; got NaN"),
    "infinity": (lambda: spion.search(jnp.asarray(NOISE / (NOISE < 0.9))), "must be finite"),
    "constant": (lambda: spion.search(np.ones((64, 64), np.float32)), "one value throughout"),
    "one_constant_of_two": (
        lambda: spion.search(np.stack([NOISE, 0 * NOISE])),
        "one value throughout",
    ),
}

MASS = {
    "not_square": (lambda: mass.search(NOISE[:, :60], density=0.5), "must be square"),
    "spread": (
        lambda: mass.search(NOISE, density=0.5, spread="all"),
        "spread must be 'model', 'layer' or 'head'; got 'all'",
    ),
    "objective": (
        lambda: mass.search(NOISE, block=8, density=0.5, objective="cube"),
        "objective must be 'square' or 'mass'; got 'cube'",
    ),
    "square_cover": (
        lambda: mass.search(NOISE, cover=0.5, objective="square"),
        "takes neither weights nor objective='square'",
    ),
    "weights": (
        lambda: mass.search(NOISE, block=8, density=0.5, weights=np.ones(3, np.float32)),
        r"weights must be of the layers or of all maps .*; got \(3,\)",
    ),
    "weights_nan": (
        lambda: mass.search(
            NOISE[None], block=8, density=0.5, weights=np.full(1, np.nan, np.float32)
        ),
        "weights must be finite",
    ),
    "weights_zero": (
        lambda: mass.search(NOISE[None], block=8, density=0.5, weights=np.zeros(1, np.float32)),
        "not all 0",
    ),
    "loss_nan": (
        lambda: patterns.layer_weights(lambda _: float("nan"), NOISE[None, None], block=8),
        "loss must be finite",
    ),
    "no_layers": (
        lambda: patterns.layer_weights(lambda _: 0.0, NOISE),
        r"maps must be \[L, P, T, T\]",
    ),
    "neither": (lambda: mass.search(NOISE), "give either density or cover.*got density=None"),
    "both": (lambda: mass.search(NOISE, density=0.5, cover=0.5), "give either density or cover"),
    "density": (lambda: mass.search(NOISE, density=1.5), r"must lie within \(0, 1\].*got 1.5"),
    "cover": (lambda: mass.search(NOISE, cover=0.0), r"must lie within \(0, 1\].*got 0.0"),
    "band": (lambda: mass.search(NOISE, density=0.5, band=-1), "band be at least 0 blocks"),
    "budget_below_band": (
        lambda: mass.search(NOISE, block=8, density=0.3),
        "density=0.3 is 19 blocks, and the diagonal with band=1 takes 22. Take density >= 0.3438",
    ),
    "causal_budget_below_band": (
        lambda: mass.search(np.stack([NOISE] * 2)[:, None], block=8, density=0.3, causal=True),
        "density=0.3 is 22 blocks, and the diagonal with band=1 takes 30. Take density >= 0.4167",
    ),
    "pooled_of_another_length": (
        lambda: mass.search(NOISE, block=16, density=0.5, length=1000),
        r"maps \[..., 63, 63\], one value for each block of 16 tokens",
    ),
    "nan": (
        lambda: mass.search(np.where(NOISE > 0.9, np.nan, NOISE), block=8, density=0.5),
        "must be finite",
    ),
    "constant": (
        lambda: mass.search(np.ones((64, 64), np.float32), block=8, density=0.5),
        "one value throughout",
    ),
}

CALLS = {
    f"{group}-{name}": entry
    for group, entries in (
        ("layouts", LAYOUTS),
        ("static", STATIC),
        ("search", SEARCH),
        ("mass", MASS),
    )
    for name, entry in entries.items()
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
