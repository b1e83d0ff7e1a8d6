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


# What is said in `common_is_faster`: cases in which it runs, and of XLA's time least, mean, most.
@pytest.mark.parametrize(
    ("side", "cases", "figures"),
    [("right", 49, (0.62, 0.80, 1.04)), ("left", 30, (0.77, 0.94, 1.03))],
)
def test_none_runs_the_kernels_where_they_were_measured_to_be_faster(side, cases, figures):
    chosen, left_out = [], []
    for row, size in itertools.product(MEASURED, (128, 256)):
        portable = row["ms"].get(f"common {side} {size}")
        if portable is None:  # such tiles do not divide the matrix
            continue
        given = lambda row=row, size=size: (
            draw(0, row["rows"], row["features"][0]),
            *common(side, size, row["ratio"], *row["features"], 0),
        )
        with pallas.lowering():
            faster = pallas.tsvd_common_is_faster(*jax.eval_shape(given), side, None)
        ms = row["ms"].get(f"{KERNEL[side]} {side} {size}")
        assert ms is not None or not faster
        if ms is not None:
            (chosen if faster else left_out).append(ms / portable)
    assert len(chosen) == cases
    found = min(chosen), np.mean(chosen), max(chosen)
    np.testing.assert_allclose(found, figures, atol=0.0051)
    assert np.mean([max(1.0, 1 / x) for x in left_out]) < 1.1  # little is missed
