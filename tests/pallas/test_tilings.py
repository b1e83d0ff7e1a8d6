"""The tilings of the attention kernels: what was measured, and which problem gets which."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
import tune_attention_gpu as tuner
from harness import RESULTS

from sparsax.pallas.block_sparse import config
from sparsax.pallas.block_sparse.config import ForwardTiling, best_config
from sparsax.pallas.block_sparse.places import Places
from sparsax.pallas.block_sparse.problem import Problem

MEASURED = json.loads((RESULTS / "tune_attention_gpu.json").read_text())["rows"]


@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("kernel", tuner.KERNELS)
@pytest.mark.parametrize("table", tuner.TABLES)
def test_tables_are_what_the_tuner_found_the_fastest(table, kernel, features):
    names = tuner.TABLES[table]
    fastest = tuner.best(MEASURED, features, kernel, names)
    if fastest is None:
        pytest.skip(f"not every one of {names} was timed")
    assert getattr(getattr(config, table)[features], kernel) == fastest


def problem(**changes) -> Problem:
    places = Places(bands=((64, 64),), causal=False, packed=True, blocks=False)
    plain = Problem(
        B=1, T=256, S=256, N=2, K=2, H=64, P=1, dtype=jnp.dtype("bfloat16"), block_q=64,
        block_kv=64, scale=1.0, left=None, right=None, ids=True, rule=places, rows=128,
        whole_rows=True,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


LISTED = Places(bands=(), causal=False, packed=True, blocks=True)


@pytest.mark.parametrize(
    ("table", "x", "masked"),
    [
        (config.RANGED, problem(), True),
        (config.RANGED, problem(rows=0, whole_rows=False), True),
        (config.PLACED, problem(whole_rows=False), True),
        (config.PLACED, problem(rule=LISTED), True),
        (config.PLACED, problem(block_kv=32), True),
        (config.MASKED, problem(rule=None), True),
        (config.TABLE, problem(rule=None), False),
        (config.MASKED, problem(rule=None, block_kv=32), False),
    ],
    ids=["one range", "no rows", "padded rows", "blocks", "gathered", "ids", "all", "small blocks"],
)
def test_two_teams_do_what_wants_few_registers(table, x, masked):
    assert best_config(x, masked) == table[64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 1}, "got stages=1"),
        ({"stages": 3, "turns": True, "teams": 2}, "got 2 teams"),
    ],
)
def test_tilings_that_would_hang_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForwardTiling(64, **options)
