"""The lists of the kernels' row tiles, against plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse import regroup
from sparsax.pallas.block_sparse.regroup import tile_lists
from sparsax.pallas.block_sparse.tiles import ROWS, Bounds


@pytest.mark.parametrize("block_kv", [32, 128])
@pytest.mark.parametrize("block_q", [32, 64, 128])
@pytest.mark.parametrize(
    ("before", "after"), [(None, None), (None, 0), (0, None), (150, 40), (20, 0)]
)
@pytest.mark.parametrize(
    ("compared", "q_len", "mask_tail", "ids", "width"),
    [(0, 150, True, False, None), (regroup.COMPARED, 450, True, False, None),
     (0, 150, False, False, 3), (regroup.COMPARED, 150, False, True, 3)],
)  # fmt: skip
def test_tiles_list_what_their_rows_see_and_know_what_needs_no_mask(
    block_q, block_kv, before, after, compared, q_len, mask_tail, ids, width, monkeypatch
):
    monkeypatch.setattr(regroup, "COMPARED", compared)
    kv_len, heads = 330, 2
    rng = np.random.default_rng(block_q + block_kv)
    blocks = rng.random((heads, -(-q_len // block_q), -(-kv_len // block_kv))) < 0.6
    if width is not None:
        blocks &= np.cumsum(blocks, -1) <= width
    pattern = sparsax.BlockPattern.from_block_mask(
        blocks, q_len=q_len, block_q=block_q, kv_len=kv_len, block_kv=block_kv, kv_width=width
    )
    bounds = Bounds(q_len, kv_len, before, after, mask_tail, ids=ids)
    lists = tile_lists(pattern.kv_num_blocks, pattern.kv_indices, bounds, block_q, block_kv)
    gap = np.arange(kv_len) - np.arange(q_len)[:, None]
    attend = np.asarray(pattern.to_mask()).copy()
    attend &= (gap >= -before) if before is not None else True
    attend &= (gap <= after) if after is not None else True
    per_tile = ROWS // block_q
    widths = (0, 0), (0, -q_len % block_q), (0, -kv_len % block_kv)
    seen = np.pad(attend, widths).reshape(heads, blocks.shape[1], block_q, -1, block_kv)
    seen = seen.any((2, 4))
    for p, r in np.ndindex(*lists.count.shape):
        count, full = int(lists.count[p, r]), 0 if lists.full is None else int(lists.full[p, r])
        cols = np.asarray(lists.cols[p, r, :count])
        rows = seen[p, r * per_tile : (r + 1) * per_tile]
        assert [*sorted(cols[:full]), *sorted(cols[full:])] == cols.tolist()
        assert sorted(cols) == np.flatnonzero(rows.any(0)).tolist()
        for slot, col in enumerate(cols):
            pairs = attend[p, r * ROWS : (r + 1) * ROWS, col * block_kv : (col + 1) * block_kv]
            tail = mask_tail and (col + 1) * block_kv > kv_len
            whole = pairs.all() and not tail and not ids
            assert (slot < full) == whole
            if lists.bits is not None:
                bits = int(lists.bits[p, r, slot])
                assert [bits >> i & 1 for i in range(len(rows))] == rows[:, col].tolist()


@pytest.mark.parametrize("compared", [0, regroup.COMPARED])
@pytest.mark.parametrize("wrong", [INVALID, 3, 2**31 - 1])
def test_an_unusable_list_makes_its_tile_invalid(wrong, compared, monkeypatch):
    monkeypatch.setattr(regroup, "COMPARED", compared)
    counts, lists = jnp.array([[2, 1, wrong, 1]]), jnp.array([[[0, 1]] * 4])
    bounds = Bounds(256, 128, None, None, mask_tail=True, ids=False)
    tiles = tile_lists(counts, lists, bounds, 64, 64)
    assert tiles.count.tolist() == [[2, INVALID]]
    assert tiles.full.tolist() == [[1, 0]]
    # And where a row block is a tile: the second of four, all of which see what comes before them.
    tiles = tile_lists(
        counts[:, 1:], lists[:, 1:], Bounds(384, 256, None, 0, True, False), 128, 128
    )
    assert tiles.count.tolist() == [[1, INVALID, 1]]
    assert tiles.full.tolist() == [[0, 0, 1]]
