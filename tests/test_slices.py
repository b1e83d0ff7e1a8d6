import jax
import numpy as np
import pytest

from sparsax import Band, CompoundPattern, patterns, slice_plan
from sparsax.patterns import compound


def tiles_with_a_pair(pattern, block_q, block_kv):
    mask = np.asarray(pattern.to_mask())
    i = range(0, pattern.seq_len, block_q)
    j = range(0, pattern.seq_len, block_kv)
    each = [mask[:, :, a : a + block_q, b : b + block_kv].any((-1, -2)) for a in i for b in j]
    return np.sum(each, axis=0).mean()


PATTERNS = {
    "window": CompoundPattern.from_parts(100, bands=[Band(20, 9)]),
    "dilated": CompoundPattern.from_parts(100, bands=[Band(2, 1, 20), Band(9, 9, 3)]),
    "slash_causal": CompoundPattern.from_parts(100, bands=[Band(50, -48)], causal=True),
    "longformer": compound.longformer(
        100, window=3, positions=np.array([[0, 90], [50, 50]]), causal=True
    ),
    "blocks": CompoundPattern.from_parts(
        100, blocks=patterns.random(100, blocks_per_row=2, heads=2, block=16)
    ),
    "big_blocks": CompoundPattern.from_parts(
        100, blocks=patterns.random(100, blocks_per_row=1, block=(48, 32))
    ),
    "odd_blocks_causal": CompoundPattern.from_parts(
        100, blocks=patterns.random(100, blocks_per_row=1, block=(35, 7)), causal=True
    ),
    "elements": CompoundPattern.from_parts(
        100, elements=compound.random_elements(100, keys_per_query=2, heads=3), causal=True
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("block", [(16, 16), (32, 16)])
def test_tiles_of_a_block_mask_are_those_that_hold_a_pair(name, block):
    plan = slice_plan(PATTERNS[name], block_q=block[0], block_kv=block[1])
    assert plan.block_mask_tiles == pytest.approx(tiles_with_a_pair(PATTERNS[name], *block))
    assert plan.dense_tiles == -(-100 // block[0]) * -(-100 // block[1])


def test_full_and_edge_tiles_of_a_band():
    """Four tiles of 16: the diagonal and its neighbours; the window spans one whole tile."""
    by_part = lambda band: {
        s.part: s.tiles
        for s in slice_plan(
            CompoundPattern.from_parts(64, bands=[band]), block_q=16, block_kv=16
        ).slices
    }
    assert by_part(Band(16, 16)) == {"bands, full tiles": 4, "bands, edge tiles": 6}
    assert by_part(Band(31, 31)) == {"bands, full tiles": 10, "bands, edge tiles": 4}
    assert by_part(Band(5, 5)) == {"bands, edge tiles": 10}
    assert by_part(Band(1, 1, 4)) == {"bands, edge tiles": 4}


def test_what_the_other_parts_cost():
    pattern = CompoundPattern.from_parts(
        64, columns=np.arange(20)[None], rows=np.array([[1], [2]]),
        blocks=patterns.diagonal(64, block=32),
        elements=compound.element_lists(np.arange(64)[None, :, None] % 20),
    )  # fmt: skip
    plan = slice_plan(pattern, head_dim=8, block_q=16, block_kv=16, itemsize=4)
    tiles = {s.part: s.tiles for s in plan.slices}
    # 20 columns are two tiles for each of four; 16 or 17 keys of 20 in a row are one or two.
    assert tiles == {"rows": 4, "blocks": 8, "columns": 8, "elements": 4}
    assert plan.slices[0].flops == 4 * (2 * 16 * 16 * 8) * 2
    assert plan.slices[0].bytes == 4 * (16 * 8 * 4) * 2
    assert plan.tiles == 24


def test_a_packed_tile_behind_a_causal_row_is_not_computed():
    pattern = CompoundPattern.from_parts(64, columns=np.arange(64)[None], causal=True)
    assert slice_plan(pattern, block_q=16, block_kv=16).tiles == 4 + 3 + 2 + 1


def test_scattered_global_tokens_are_where_slicing_wins():
    """QDS: 2048 tokens, a window of 64, sentence starts every 22 +- 8 tokens."""
    rng = np.random.default_rng(0)
    starts = 12 + np.cumsum(rng.integers(14, 31, 90))
    pattern = compound.qds(
        2048, window=64, query_lens=np.array([12]), max_query_len=12, sentence_starts=starts[None],
        num_sentences=np.array([int((starts < 2048).sum())]),
    )  # fmt: skip
    plan = slice_plan(pattern)
    assert plan.block_mask_tiles / plan.dense_tiles > 0.99
    assert plan.tiles / plan.dense_tiles == pytest.approx(0.217, abs=1e-3)
    contiguous = slice_plan(compound.longformer(4096, window=256, positions=np.arange(32)[None]))
    assert contiguous.block_mask_tiles / contiguous.dense_tiles == pytest.approx(0.165, abs=1e-3)
    assert contiguous.tiles / contiguous.dense_tiles == pytest.approx(0.167, abs=1e-3)
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines] == [
        "part", "rows", "bands,", "bands,", "columns", "sliced", "block",
    ]  # fmt: skip


def test_refusals():
    pattern = PATTERNS["longformer"]
    with pytest.raises(ValueError, match="needs a single, valid pattern with values"):
        jax.jit(lambda p: slice_plan(p).tiles)(pattern)
    with pytest.raises(ValueError, match="needs a single, valid pattern with values"):
        slice_plan(jax.tree.map(lambda x: x[None], pattern))
