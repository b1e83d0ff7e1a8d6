"""What None runs of tiled factors, by what the committed result has of each way on an H200."""

import itertools
import json

import jax
import numpy as np
import pytest
from harness import RESULTS
from tsvd_ways import draw, tiled

from sparsax import pallas
from sparsax.pallas.tsvd import best_schedule

TILES = 256, 512, 1024
MEASURED = json.loads((RESULTS / "tsvd_all.json").read_text())["rows"]
# By rows: how much longer than the fastest way with the same factors None takes, in the mean.
MOST = {1: 1.03, 16: 1.01, 64: 1.05, 512: 1.02, 4096: 1.01, 8192: 1.01}


def chosen(row: dict, size: int) -> str:
    """The way that None takes on a Hopper GPU."""
    given = lambda: (draw(0, row["rows"], row["features"][0]),
                     *tiled(size, row["ratio"], *row["features"], 0))  # fmt: skip
    x, u, v = jax.eval_shape(given)
    with pallas.lowering():
        kernels = pallas.tsvd_is_faster(x, u, v, None)
    return best_schedule(len(x), u, v) if kernels else "xla"


def times(row: dict, size: int) -> dict[str, float]:
    """Milliseconds by way, of those with such tiles that each have a factor of their own."""
    found = (name.split() for name in row["ms"])
    ways = [way for way, *rest in found if rest == [str(size)]]
    return {way: row["ms"][f"{way} {size}"] for way in ways}


@pytest.mark.parametrize("rows", MOST)
def test_none_runs_what_was_measured_to_be_the_fastest(rows):
    slower = []
    for row, size in itertools.product(MEASURED, TILES):
        found = times(row, size)
        if row["rows"] == rows and found:
            slower.append(found[chosen(row, size)] / min(found.values()))
    assert len(slower) >= 15
    assert np.mean(slower) < MOST[rows]


@pytest.mark.parametrize("rows", MOST)
def test_none_runs_no_kernel_that_was_measured_to_be_behind_xla(rows):
    kernels = 0
    for row, size in itertools.product(MEASURED, TILES):
        found = times(row, size)
        if row["rows"] == rows and found:
            kernels += (way := chosen(row, size)) != "xla"
            assert found[way] < 1.07 * found["xla"], (row["layer"], size)
    assert kernels >= 10
