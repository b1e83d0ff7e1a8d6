"""The tilings of the attention kernels: what the tuner's committed result has as the fastest."""

import json

import pytest
import tune_attention_gpu as tuner
from harness import RESULTS

from sparsax.pallas.block_sparse import config

MEASURED = json.loads((RESULTS / "tune_attention_gpu.json").read_text())["rows"]


@pytest.mark.parametrize("features", sorted(config.TABLE))
@pytest.mark.parametrize("kernel", tuner.KERNELS)
@pytest.mark.parametrize("table", tuner.TABLES)
def test_tables_are_what_the_tuner_found_the_fastest(table, kernel, features):
    fastest = tuner.best(MEASURED, features, kernel, tuner.TABLES[table])
    assert getattr(getattr(config, table)[features], kernel) == fastest
