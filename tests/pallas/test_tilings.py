"""Which tilings a problem of attention gets, and which are refused."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparsax.pallas.block_sparse import config
from sparsax.pallas.block_sparse.config import best_config
from sparsax.pallas.block_sparse.places import Places
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiling import ForwardTiling, KeyTiling


def problem(**changes) -> Problem:
    places = Places(bands=((64, 64),), causal=False, packed=True, blocks=False)
    plain = Problem(
        B=1, T=256, S=256, N=2, K=2, H=64, P=1, dtype=jnp.dtype("bfloat16"), block_q=64,
        block_kv=64, scale=1.0, left=None, right=None, ids=True, rule=places, rows=128,
        whole_rows=True,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


LISTED = Places(bands=(), causal=False, packed=True, blocks=True)


@pytest.mark.parametrize("features", [64, 96, 128])
@pytest.mark.parametrize(
    ("table", "x", "masked"),
    [
        ("RANGED", problem(), True),
        ("RANGED", problem(rows=0, whole_rows=False), True),
        ("PLACED", problem(whole_rows=False), True),
        ("PLACED", problem(rule=LISTED), True),
        ("MASKED", problem(rule=None), True),
        ("MASKED", problem(rule=None, ids=False, right=0), True),
        ("MASKED", problem(rule=None, ids=False, block_q=128, block_kv=128), True),
        ("SMALL", problem(rule=None, ids=False), True),
        ("TABLE", problem(rule=None), False),
    ],
    ids=[
        "one range",
        "no rows",
        "padded rows",
        "blocks",
        "ids",
        "causal",
        "ragged",
        "lists",
        "all",
    ],
)
def test_a_problem_gets_the_table_of_its_mask(table, x, masked, features):
    x = dataclasses.replace(x, H=features)
    assert best_config(x, masked) == getattr(config, table)[features]


def test_two_teams_are_for_masks_that_want_few_registers():
    teams = lambda x, masked: best_config(x, masked).forward.teams
    assert teams(problem(), True) == teams(problem(rule=None), False) == 2
    assert teams(problem(whole_rows=False), True) == teams(problem(rule=None), True) == 1
    # A tile that gathers blocks masks those that are not there.
    assert teams(problem(rule=None, block_kv=32), False) == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ForwardTiling, {"stages": 1}, "got stages=1"),
        (ForwardTiling, {"stages": 3, "turns": True, "teams": 2}, "got 2 teams"),
        (KeyTiling, {"stages": 2, "early": 3}, "early must be 0, 1 or 2; got 3"),
        (KeyTiling, {"stages": 2, "spaces": 3}, "spaces must be 1 or 2; got 3"),
    ],
)
def test_tilings_that_no_kernel_can_have_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(64, **options)
