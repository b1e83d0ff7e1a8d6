"""The schedule of the kernels, against plain Python."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparsax
from sparsax import pallas
from sparsax.pallas.block_sparse import attention, schedule
from sparsax.pallas.block_sparse import deal as dealing
from sparsax.pallas.block_sparse.deal import LEAST, deal
from sparsax.pallas.block_sparse.schedule import (
    HEADER,
    LONG,
    OF_ROW,
    Expected,
    Schedule,
    units,
)
from sparsax.pallas.hopper import multiprocessors


def test_counts_beyond_all_capacity_are_dealt_as_the_longest_rows():
    """Or a row would be cut into more pieces than there is room for, and written past the end."""
    work = np.random.default_rng(0).integers(0, 40, (2, 21)).astype(np.int32)
    plan = Schedule(2, 21, copies=1, longest=64)
    wild = work.copy()
    wild[0, 3], wild[0, 7], wild[1, 0], wild[1, 20] = 2**31 - 1, 2**30, -(2**31), 65
    tame = np.clip(wild, 0, 64)
    assert plan.extra > 0
    for found, want in zip(table_of(plan, wild), table_of(plan, tame), strict=True):
        np.testing.assert_array_equal(found, want)


def table_of(plan, work, *extra):
    with pallas.interpreted():
        options = {"interpret": pallas.interpret()}
    table, splits = deal(plan, *(jnp.asarray(x, jnp.int32) for x in (work, *extra)), **options)
    table = np.asarray(table)
    return table, None if splits is None else np.asarray(splits)[:, : table[0]]  # the rest is open


def items_of(plan, table, team, extra=()):
    slots = int(plan.slots(np.int32(team), plan.header(table)))
    return [item_of(plan, table, team, slot, extra) for slot in range(slots)]


def item_of(plan, table, team, slot=0, extra=()):
    where = np.int32(team), np.int32(slot), None
    return plan.item(*plan.read(*where, table, plan.header(table), extra))


def test_how_many_rows_a_thread_block_ranks_changes_nothing(monkeypatch):
    work = np.random.default_rng(0).integers(0, 40, (3, 21)).astype(np.int32)
    work[1, 5] = 400
    plan = Schedule(3, 21, copies=2, longest=400)
    table, splits = table_of(plan, work, work + 7)
    assert splits is not None
    assert table[0] > 0  # rows are cut
    monkeypatch.setattr(dealing, "AT_ONCE", 1)
    monkeypatch.setattr(dealing, "multiprocessors", lambda: 1)
    many, of_many = table_of(plan, work, work + 7)
    items = plan.extra + plan.rows
    used = np.r_[np.arange(table[0]), np.arange(plan.extra, items)]  # the rest is not written
    places = np.r_[:HEADER, HEADER + np.add.outer(np.arange(5) * items, used).ravel()]
    np.testing.assert_array_equal(many[places], table[places])
    np.testing.assert_array_equal(of_many, splits)


@pytest.mark.parametrize(("block", "times", "longest"), [(32, 1, 20), (64, 3, 400), (128, 2, 9)])
def test_work_is_counted_in_units_of_row_tiles(block, times, longest):
    entries = np.random.default_rng(1).integers(-1, 40, (2, 13)).astype(np.int32)
    entries[1, 4] = longest
    plan = Schedule(2, 13, copies=1, longest=times * units(longest, block))
    with pallas.interpreted():
        options = {"interpret": pallas.interpret(), "block": block, "times": times}
        got = deal(plan, jnp.asarray(entries), **options)
    want = table_of(plan, times * units(np.maximum(entries, 0), block))
    used = got[0][0] if want[1] is not None else 0
    items = plan.extra + plan.rows
    used = np.r_[: int(used), plan.extra : items]
    places = np.r_[:HEADER, HEADER + np.add.outer(np.arange(4) * items, used).ravel()]
    np.testing.assert_array_equal(np.asarray(got[0])[places], want[0][places])


@pytest.mark.parametrize("teams", [1, 2])
@pytest.mark.parametrize(
    ("tiles", "copies"), [(1, 1), (11, 12), (12, 11), (66, 2), (11, 24), (8, 17)]
)
def test_few_rows_have_a_team_each_in_any_order(tiles, copies, teams):
    plan = Schedule(1, tiles, copies, longest=9, teams=teams).in_any_order()
    assert plan.single == (tiles * copies <= teams * multiprocessors())
    assert not Schedule(1, tiles, 1, longest=4 * LONG, teams=teams).in_any_order().single
    if not plan.single:
        return
    assert plan.thread_blocks == min(multiprocessors(), tiles * copies)
    found = [
        plan.item(*plan.read(plan.number(block, team), 0, None, None, None, ()))
        for block in range(plan.thread_blocks) for team in range(teams)
    ]  # fmt: skip
    done = [(int(item.row), int(item.copy)) for item in found if item.row >= 0]
    assert sorted(done) == list(itertools.product(range(tiles), range(copies)))


works = st.lists(st.integers(0, 40) | st.just(400), min_size=1, max_size=20)


LONE = {"work": [9] * 3 + [0] * 17, "owners": 2, "copies": 2, "longest": 9, "processors": 8}
CUT = {"work": [400, *[1] * 15], "owners": 1, "copies": 1, "longest": 400, "processors": 8}


@settings(deadline=None, max_examples=8)
@example(**LONE, teams=1, stay=schedule.STAY + 8)  # a team each for rows longer than the mean
@example(**LONE, teams=2, stay=schedule.STAY + 8)
@example(**CUT, teams=2, stay=schedule.STAY)  # pieces for teams that stay
@example(**CUT, teams=1, stay=0)
@given(
    work=works,
    owners=st.integers(1, 3),
    copies=st.integers(1, 4),
    longest=st.sampled_from((9, 400)),
    teams=st.integers(1, 2),
    stay=st.sampled_from((0, schedule.STAY)),
    processors=st.sampled_from((8, 132)),
)
def test_every_tile_of_every_row_and_copy_is_done_exactly_once(
    work, owners, copies, longest, teams, stay, processors
):
    with (
        mock.patch.object(schedule, "STAY", stay),
        mock.patch.object(schedule, "multiprocessors", return_value=processors),
    ):
        every_tile_is_done_once(work, owners, copies, longest, teams)


def every_tile_is_done_once(work, owners, copies, longest, teams):
    work = np.resize(np.minimum(np.array(work, np.int32), longest), (owners, len(work)))
    plan = Schedule(owners, work.shape[1], copies, longest, teams=teams)
    table, splits = table_of(plan, work, work + 7)
    done = [[] for _ in range(work.size * copies)]
    items = [
        item
        for block in range(plan.thread_blocks)
        for team in range(teams)
        for item in items_of(plan, table, plan.number(block, team), (work + 7,))
    ]
    parts = {}
    for item in items:
        row, first, last, part = (int(x) for x in (item.row, item.first, item.last, item.part))
        if row < 0:
            assert first == last or int(item.last) == int(item.first)
            continue
        flat = int(item.owner) * work.shape[1] + row
        assert int(item.extra[0]) == work.ravel()[flat] + 7
        done[flat * copies + int(item.copy)].append((first, last, part))
        parts.setdefault((part, int(item.copy)), []).append(flat)
    for index, pieces in enumerate(done):
        pieces = sorted(pieces)
        ends = [0, *(last for _, last, _ in pieces)]
        assert [first for first, _, _ in pieces] == ends[:-1]
        assert ends[-1] == work.ravel()[index // copies]
        assert (len(pieces) > 1) == (pieces[0][2] >= 0)
    assert all(len(rows) == 1 for (part, _), rows in parts.items() if part >= 0)
    if plan.extra:
        listed = {
            int(row): [plan.extra + nth, *range(nth, nth + int(more))]
            for nth, (row, more) in enumerate(splits.T)
            if more > 0
        }
        assert listed == {
            flat: [part for _, _, part in pieces]
            for flat, pieces in ((i // copies, sorted(d)) for i, d in enumerate(done))
            if len(pieces) > 1
        }


def test_long_rows_start_first_and_no_item_outlasts_its_share():
    work = np.full((2, 128), 9, np.int32)
    work[:, [5, 90]] = 128
    whole = Schedule(2, 128, multiprocessors(), 128)
    table, _ = table_of(whole, work)
    first = [item_of(whole, table, block) for block in range(multiprocessors())]
    assert {int(item.row) for item in first} == {5}
    assert {int(item.owner) for item in first} == {0}
    few = Schedule(1, 128, 1, 128)
    table, _ = table_of(few, work[:1])
    share = max(LEAST, -(-work[0].sum() // few.extra))
    items = [item for team in range(few.staying) for item in items_of(few, table, team)]
    spans = [int(item.last) - int(item.first) for item in items]
    assert sum(spans) == work[0].sum()
    assert max(spans) <= share


def test_heads_take_turns_where_lists_are_short():
    work = np.arange(32) * np.ones((5, 1), int)
    plan = Schedule(5, 32, 1, 31)
    table, splits = table_of(plan, work)
    first = [item_of(plan, table, block) for block in range(10)]
    assert splits is None
    assert [int(item.row) for item in first] == [31] * 5 + [30] * 5
    assert [int(item.owner) for item in first] == [*range(5)] * 2


@pytest.mark.parametrize("stay", [0, schedule.STAY])
def test_more_rows_than_registers_hold(stay, monkeypatch):
    monkeypatch.setattr(schedule, "STAY", stay)
    monkeypatch.setattr("sparsax.pallas.block_sparse.deal.CHUNK", 512)
    work = np.random.default_rng(0).integers(0, 40, (3, 130)).astype(np.int32)
    work[0, 3] = work[2, 129] = 900
    plan = Schedule(3, 130, 1, 1000)
    table, splits = table_of(plan, work)
    share = max(LEAST, -(-work.sum() // plan.extra))
    more = np.maximum(work - 1, 0) // share
    assert table[0] == more.sum() > 0
    rows, counts = splits
    assert [(r, m) for r, m in zip(rows, counts, strict=True) if m] == [
        (i, m) for i, m in enumerate(more.ravel()) if m
    ]
    order = table[HEADER + plan.extra :][: work.size]
    want = np.argsort(-work, axis=-1, kind="stable") + 130 * np.arange(3)[:, None]
    if plan.stay:
        want = np.argsort(-work.ravel(), kind="stable")
    assert (order == want.ravel()).all()


def test_thread_blocks_that_stay_do_most_and_the_rest_is_done_one_by_one():
    plan = Schedule(16, 128, 1, 31)
    blocks = multiprocessors()
    assert (plan.staying, plan.dealt) == (blocks, 19 * 2048 // (20 * blocks))
    assert plan.thread_blocks == blocks + 2048 - plan.dealt * blocks
    assert plan.left == 1


@pytest.mark.parametrize("teams", [1, 2])
def test_of_few_rows_none_is_left_to_thread_blocks_of_one(teams):
    turns, blocks = schedule.STAY // teams, multiprocessors()
    plan = Schedule(turns, teams * blocks, 1, 31, teams=teams)
    assert (plan.staying, plan.dealt, plan.thread_blocks) == (teams * blocks, turns, blocks)
    assert Schedule(turns, teams * blocks + 1, 1, 31, teams=teams).passing > 0
    # In order of length and back again: the work of teams differs by less than a row's.
    work = np.random.default_rng(0).integers(0, 32, (turns, plan.tiles))
    table, _ = table_of(plan, work)
    loads = loads_of(plan, table)
    assert max(loads) - min(loads) < 8
    # And as many multiprocessors as there are rows, or pieces of them.
    assert Schedule(1, 8, 1, 8, teams=teams).thread_blocks == 8
    cut = Schedule(1, 8, 1, 640, teams=teams)
    assert (cut.thread_blocks, cut.dealt) == (blocks, -(-cut.items // (teams * blocks)))


def loads_of(plan, table) -> list[int]:
    every = [items_of(plan, table, team) for team in range(plan.staying)]
    return [sum(int(item.last) - int(item.first) for item in items) for items in every]


@pytest.mark.parametrize(("copies", "teams"), [(1, 1), (2, 1), (1, 2)])
def test_beside_a_row_longer_than_the_mean_load_a_team_does_nothing(copies, teams):
    blocks, long = teams * multiprocessors(), 30
    work = np.full((2, blocks // copies), 3)
    work[0, 5:15] = work[1, 7:17] = long
    plan = Schedule(2, blocks // copies, copies, 31, teams=teams)
    table, _ = table_of(plan, work)
    assert table[teams] == 20
    loads = loads_of(plan, table)
    assert sorted(loads)[-20 * copies :] == [long] * 20 * copies
    assert max(loads[20 * copies :]) <= 9
    assert sum(loads) == copies * work.sum()


def test_two_teams_share_a_multiprocessor_only_once_all_are_busy():
    few = Schedule(1, 100, 1, 31, teams=2)
    assert (few.staying, few.thread_blocks) == (200, 100)
    assert [int(few.number(99, team)) for team in (0, 1)] == [99, 199]
    more = Schedule(2, 100, 1, 31, teams=2)
    assert more.thread_blocks == multiprocessors()
    many = Schedule(16, 128, 1, 31, teams=2)
    assert many.staying == 2 * multiprocessors()
    assert [int(many.number(0, team)) for team in (0, 1)] == [0, multiprocessors()]


def test_copies_that_keep_the_gpu_busy_leave_rows_whole():
    plan = Schedule(1, 64, 600, 4000)
    work = np.full((1, 64), 5)
    work[0, 3] = 4000
    table, splits = table_of(plan, work)
    assert (plan.extra, plan.parts, splits) == (0, 0, None)
    assert table.shape == (HEADER + 4 * 64,)


def test_no_row_is_cut_that_the_expected_work_outlasts():
    share = multiprocessors()  # units of a head where as many as a row's fall on each
    cut, whole = (Schedule(1, 33, 32, 32, Expected(units)) for units in (share - 1, share))
    assert cut.extra > 0
    assert (whole.extra, whole.parts) == (0, 0)


@pytest.mark.parametrize("teams", [1, 2])
@pytest.mark.parametrize("copies", [1, 11])
def test_rows_of_known_work_are_dealt_beforehand_and_evenly(copies, teams):
    owners, of_rows = 3, (1, 2, 2, 40, 5) * 4
    tiles, longest = len(of_rows), max(of_rows)
    expected = Expected(longest * multiprocessors(), of_rows)
    plan = Schedule(owners, tiles, copies, longest, expected, teams)
    count = np.arange(owners * tiles, dtype=np.int32).reshape(owners, tiles)
    table, splits = deal(plan, jnp.asarray(count), interpret=None)
    assert splits is None
    table, done, busy = np.asarray(table), [], []
    numbers = [
        int(plan.number(block, team))
        for block in range(plan.thread_blocks)
        for team in range(teams)
    ]
    assert plan.thread_blocks == min(multiprocessors(), owners * tiles * copies)
    for team in numbers:
        looked = [plan.look(team, slot, table) for slot in range(plan.dealt + 2)]
        items = [
            plan.item(*plan.read(team, slot, seen, table, None, (count,)))
            for slot, seen in enumerate(looked)
        ]
        there = [item for item in items if int(item.row) >= 0]
        work = [of_rows[int(item.row)] for item in there]
        assert work == sorted(work, reverse=True)
        busy.append(sum(work) + OF_ROW * len(work))
        for item in there:
            assert (int(item.first), int(item.last), int(item.part)) == (0, longest, -1)
            assert int(item.extra[0]) == int(item.owner) * tiles + int(item.row)
            done.append((int(item.owner), int(item.row), int(item.copy)))
    assert sorted(done) == list(itertools.product(range(owners), range(tiles), range(copies)))
    even = (owners * copies * (sum(of_rows) + OF_ROW * tiles)) / (multiprocessors() * teams)
    assert max(busy) <= max(longest + OF_ROW, even + longest / 2)


def test_rows_that_are_cut_want_a_table():
    assert not Schedule(1, 33, 32, 32, Expected(0, (1,) * 33)).beforehand


def test_rows_whose_columns_are_cached_stay_for_longer():
    rows = schedule.STAY_CACHED * multiprocessors()
    plan = lambda count, cached: Schedule(8, count // 8, 1, 31, cached=cached)
    assert plan(rows, cached=True).stay
    assert not plan(rows + 8, cached=True).stay
    assert not plan(rows, cached=False).stay


def test_columns_are_cached_up_to_the_size_of_the_cache():
    problem = mock.Mock(spec=attention.Problem, B=2, H=64, dtype=jnp.bfloat16)
    positions = attention.CACHE // (2 * 2 * 64 * 2 * 4)  # of both arrays of two samples, 4 heads
    assert attention._cached(problem, positions, 4)
    assert not attention._cached(problem, positions + 1, 4)
    assert not attention._cached(problem, positions, 5)


def test_rows_meet_keys_and_columns_meet_queries(monkeypatch):
    asked, cached = [], attention._cached
    monkeypatch.setattr(attention, "_cached", lambda *x: asked.append(x[1:]) or cached(*x))
    pattern = sparsax.BlockPattern.from_block_mask(
        np.ones((1, 2, 3), bool), q_len=256, block_q=128, kv_len=384, block_kv=128
    )
    of = lambda length, heads: jnp.zeros((1, length, heads, 64), jnp.bfloat16)

    def loss(q, k, v):
        o = sparsax.block_sparse_attention(q, k, v, pattern, implementation="pallas")
        return o.astype(jnp.float32).sum()

    with pallas.lowering():
        jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(of(256, 4), of(384, 2), of(384, 2))
    assert set(asked) == {(384, 2), (256, 4)}
    assert asked[-1] == (256, 4)  # of dK and dV, which are last
