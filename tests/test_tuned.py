"""The tilings of the attention kernels: what the tuner's committed result has as the fastest."""

import json

import pytest
import tune_attention_gpu as tuner
from harness import RESULTS

from sparsax.pallas.block_sparse import config

MEASURED = json.loads((RESULTS / "tune_attention_gpu.json").read_text())["rows"]


# Not timed since the kernels changed: chosen by earlier runs, or as a table like it.
UNTIMED = {
    ("MASKED", "dq", 64), ("RANGED", "dq", 64), ("RANGED", "dkv", 64),
    ("PLACED", "dkv", 64),
    *((table, kernel, 128) for table in ("PLACED", "RANGED") for kernel in tuner.KERNELS),
}  # fmt: skip


@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("kernel", tuner.KERNELS)
@pytest.mark.parametrize("table", tuner.TABLES)
def test_tables_are_what_the_tuner_found_the_fastest(table, kernel, features):
    fastest = tuner.best(MEASURED, features, kernel, tuner.TABLES[table])
    assert (fastest is None) == ((table, kernel, features) in UNTIMED)
    if fastest is not None:
        assert getattr(getattr(config, table)[features], kernel) == fastest
