"""What the lists and the rule of compound attention admit, pair by pair, without a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax.pallas.block_sparse.problem import whole_tiles
from sparsax.pallas.block_sparse.schedule import units
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.compound.cover import expected_work
from sparsax.pallas.compound.keys import Keys, problem_of
from sparsax.pallas.compound.lists import key_lists, query_lists
from tests.pallas.compound_cases import CASES, case


def admitted(c, keys_in_rows):
    """How often each pair is computed, `[B, N, T, T]`, as the kernels walk and mask the lists."""
    q, k, *_ = c.inputs()
    pattern = c.pattern()
    x = problem_of(q, k, pattern, 1.0, c.own)

    @jax.jit
    def read(pattern):
        keys = Keys(x, pattern)
        lists = (key_lists if keys_in_rows else query_lists)(keys)
        return lists, keys.places, (keys.slots, keys.row_slots), pattern.to_mask()

    lists, *rest = read(pattern)
    full, count, cols = map(np.asarray, (lists.full, lists.count, lists.cols))
    bits = None if lists.bits is None else np.asarray(lists.bits)
    places, at, mask = jax.tree.map(np.asarray, rest)
    bounds = x.kv_bounds if keys_in_rows else x.q_bounds
    block_row, block_col = (x.block_kv, x.block_q) if keys_in_rows else (x.block_q, x.block_kv)
    if x.rule is not None:
        pad = lambda y, fill: np.pad(y[:, 0], ((0, 0), (0, 0), (0, 256)), constant_values=fill)
        along = pad(places[0], -2), pad(places[1], -3)
        along_row, along_col = reversed(along) if keys_in_rows else along
    # By position, with room for what tiles have past the ends.
    found = np.zeros((x.B, x.N, x.q_rows + 512, x.kv_rows + 512), int)
    for b, n, r in np.ndindex(x.B, x.N, count.shape[1]):
        p = n // (x.N // x.P)
        own = (b if x.samples > 1 else 0) * x.P + p
        for entry in range(count[own, r]):
            first = cols[p, r, entry] * block_col
            row, col = slice(r * ROWS, (r + 1) * ROWS), slice(first, first + block_col)
            kept = np.ones((ROWS, block_col), bool)
            if entry >= full[own, r]:
                listed = None
                if bits is not None:
                    word = bits[p, r, entry] >> (np.arange(ROWS) // block_row)
                    listed = jnp.broadcast_to(((word & 1) == 1)[:, None], kept.shape)
                if x.rule is None:
                    there = np.arange(first, first + block_col) < bounds.cols
                    kept = kept & there if listed is None else np.asarray(listed) & there
                else:
                    of_pairs = jnp.asarray(along_row[b, :, row]), jnp.asarray(along_col[b, :, col])
                    position = first if keys_in_rows else r * ROWS
                    if x.rows and position >= x.rows_from:
                        kept = bounds.rule.seen_by_global_rows(*of_pairs, kept.shape)
                    else:
                        kept = bounds.rule.keep(*of_pairs, listed, kept.shape)
            kept = np.asarray(kept)
            if keys_in_rows:
                found[b, n, col, row] += kept.T
            else:
                found[b, n, row, col] += kept
    return folded(found, x, pattern, at, keys_in_rows), mask


def folded(found, x, pattern, at, keys_in_rows):
    """Pairs of tokens, whichever copies of them attended to each other; `[B, N, T, T]`.

    `at`: where the packed keys stand, and the global rows.
    """
    total = found[:, :, : x.T, : x.T].copy()
    packed, asking = at
    for b in range(x.B):
        sample = b if x.samples > 1 else 0
        for i, column in enumerate(packed[sample]):
            pairs = found[b, :, : x.T, x.packed_from + i]
            if column < x.T:
                total[b, :, :, column] += pairs
            else:
                assert not pairs.any()
        # As ordinary rows the global ones are thrown away.
        there = asking[sample] < x.T
        total[b, :, asking[sample][there]] = 0
        for i in np.flatnonzero(there):
            row = found[b, :, x.rows_from + i]
            seen = slice(x.rows_see_from, x.rows_see_from + x.T)
            total[b, :, asking[sample, i]] += row[:, seen]
            row[:, seen] = 0
            if keys_in_rows:  # gradients of keys past the end are cut off
                row[:, seen.stop : seen.start + whole_tiles(x.T)] = 0
            assert not row.any()
    if pattern.token_mask is not None:  # whole tiles ask no query, see attention.forward
        total *= np.asarray(pattern.token_mask)[:, None, :, None]
    return total


@pytest.mark.parametrize("keys_in_rows", [False, True])
@pytest.mark.parametrize("c", [c for c in CASES if c.T < 1000], ids=lambda c: c.name)
def test_every_pair_is_computed_once(c, keys_in_rows):
    total, mask = admitted(c, keys_in_rows)
    want = np.repeat(mask, c.N // mask.shape[1], 1)
    np.testing.assert_array_equal(total, np.broadcast_to(want, total.shape).astype(int))


def work_of(c, keys_in_rows):
    """The units of work that are expected, and those of each list."""
    q, k, *_ = c.inputs()
    pattern = c.pattern()
    x = problem_of(q, k, pattern, 1.0, c.own)
    make = key_lists if keys_in_rows else query_lists
    count = jax.jit(lambda pattern: make(Keys(x, pattern)).count)(pattern)
    listed = units(np.maximum(np.asarray(count), 0), x.block_q if keys_in_rows else x.block_kv)
    return expected_work(x, pattern, keys_in_rows), listed


@pytest.mark.parametrize("keys_in_rows", [False, True])
@pytest.mark.parametrize(
    "name", ["window", "window_causal", "bands_that_overlap", "vertical_slash"]
)
def test_expected_work_of_bands_is_in_the_lists(name, keys_in_rows):
    expected, listed = work_of(case(name), keys_in_rows)
    packed, listed = case(name).pattern().columns.shape[-1], listed.sum(-1)
    assert expected.units > 0
    assert (expected.units == listed).all() if packed == 0 else (expected.units < listed).all()


@pytest.mark.parametrize("keys_in_rows", [False, True])
def test_expected_work_of_blocks_is_that_of_full_lists(keys_in_rows):
    expected, listed = work_of(case("bigbird"), keys_in_rows)
    listed = listed.sum(-1)
    assert listed.max() / 2 < expected.units < 2 * listed.max()
    assert not expected.of_rows


def test_no_work_is_expected_where_only_data_says():
    for name, keys_in_rows in (("columns", False), ("rows", True)):
        assert work_of(case(name), keys_in_rows)[0].units == 0


@pytest.mark.parametrize("keys_in_rows", [False, True])
@pytest.mark.parametrize(
    "name", ["window", "window_causal", "vertical_slash", "rows", "rows_causal", "longformer"]
)
def test_the_work_of_rows_is_known_beforehand(name, keys_in_rows):
    expected, listed = work_of(case(name), keys_in_rows)
    of_rows = np.array(expected.of_rows)
    assert of_rows.shape == listed.shape[1:]
    assert (of_rows >= listed).all()  # of a causal pattern, or one with columns to spare, more
    if not case(name).pattern().causal:
        assert (of_rows <= listed.max(0) + 1).all()


def test_padding_leaves_the_work_of_rows_unknown():
    assert not work_of(case("longformer_padded_own"), False)[0].of_rows


@pytest.mark.parametrize("name", ["longformer", "longformer_whole_tiles", "rows_own_padded"])
def test_whole_rows_need_no_mask(name):
    c = case(name)
    q, k, *_ = c.inputs()
    pattern = c.pattern()
    x = problem_of(q, k, pattern, 1.0, c.own)
    lists = query_lists(Keys(x, pattern))
    rows = slice(x.rows_from // ROWS, None)
    full, count = np.asarray(lists.full)[:, rows], np.asarray(lists.count)[:, rows]
    assert x.whole_rows == (name == "longformer_whole_tiles")
    if x.whole_rows:
        assert (full == count).all()
        assert (count % (ROWS // x.block_kv) == 0).all()
