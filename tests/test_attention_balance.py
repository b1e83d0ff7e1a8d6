"""How even the kernels' work is: the committed figures are those of the schedule as it is."""

import json
from unittest import mock

import attention_balance as balance
import attention_schedule_gpu as schedule_gpu
import numpy as np
import pytest
from harness import RESULTS

from sparsax.pallas.block_sparse import schedule
from sparsax.pallas.block_sparse.schedule import PIECES, Schedule
from sparsax.pallas.hopper import multiprocessors

MEASURED = json.loads((RESULTS / "attention_balance.json").read_text())["rows"]


def test_a_thread_block_goes_to_who_is_free_first():
    rest = [1.0] * (multiprocessors() - 1)
    assert balance.busy([1.0, *rest]) == 1
    # The first is free again when all others are: two rounds, of which the second does one.
    assert balance.busy([1.0, *rest, 1.0]) == pytest.approx((len(rest) + 2) / (2 * len(rest) + 2))
    assert balance.busy([*rest, 1.0, 10.0]) < balance.busy([10.0, 1.0, *rest])


def test_the_result_is_what_the_schedule_deals():
    row = next(
        row for row in MEASURED
        if row["walked"] == "columns" and "one full column, one head" in row["pattern"]
    )  # fmt: skip
    columns = balance.verticals(1, balance.LENGTH // balance.BLOCK, 1).sum(1, dtype=np.int32)
    assert balance.busy(balance.dealt(columns)) == pytest.approx(row["dealt"])
    assert row["dealt"] > 5 * row["longest_first"]


def test_the_schedule_before_rows_stayed_cuts_as_if_there_were_many():
    few = Schedule(16, 32, copies=1, longest=32)
    assert schedule_gpu.uncapped(few) == PIECES * multiprocessors() > few.extra
    assert schedule_gpu.uncapped(Schedule(16, 16, copies=1, longest=16)) == 0
    # Settings are read while a program is traced: the table of either has its own items.
    with mock.patch.object(schedule, "STAY", 0):
        assert few.passing > 0
    assert few.passing == 0
