"""What None runs of tiles with a common factor, by what was measured of each way on an H200."""

import itertools
import json

import jax
import numpy as np
import pytest
from harness import RESULTS
from tsvd_ways import common, draw

from sparsax import pallas

MEASURED = json.loads((RESULTS / "tsvd_common.json").read_text())["rows"]
KERNEL = {"right": "common-shared", "left": "common-products"}  # what None may run
MOST = {"right": 0.82, "left": 0.95}  # of XLA's time, in the mean of what it does run


@pytest.mark.parametrize("side", KERNEL)
def test_none_runs_the_kernels_where_they_were_measured_to_be_faster(side):
    chosen, left_out = [], []
    for row, size in itertools.product(MEASURED, (128, 256)):
        given = lambda row=row, size=size: (
            draw(0, row["rows"], row["features"][0]),
            *common(side, size, row["ratio"], *row["features"], 0),
        )
        ms = row["ms"].get(f"{KERNEL[side]} {side} {size}")
        portable = row["ms"].get(f"common {side} {size}")
        if portable is not None:
            with pallas.lowering():
                faster = pallas.tsvd_common_is_faster(*jax.eval_shape(given), side, None)
            assert ms is not None or not faster
        if ms is not None:
            (chosen if faster else left_out).append(ms / portable)
    assert len(chosen) >= 30
    assert max(chosen) < 1.05
    assert np.mean(chosen) < MOST[side]
    assert np.mean([max(1.0, 1 / x) for x in left_out]) < 1.1  # little is missed
