"""How benchmarks on a GPU time: every call is made, and runs queue up."""

import re

import jax.numpy as jnp
import pytest
import timing


@pytest.mark.parametrize(("calls", "products"), [(1, 1), (4, 4), (6, 6), (9, 5)])
def test_a_loop_makes_every_call(calls, products):
    run, x = timing.repeated(lambda x: x @ x, calls), jnp.ones((8, 8))
    assert run(x) == 8 * calls
    # A step of the loop holds four, and what is left stands behind it: none is joined with another.
    compiled = run.lower(x).compile().as_text()
    assert len(re.findall(r"= \S+ dot\(", compiled)) == products


@pytest.mark.parametrize(
    ("seconds", "runs"), [(0.02, 2), (0.001, 50), (1e-5, timing.MOST), (0.2, 1)]
)
def test_runs_queue_up_for_as_long_as_is_asked(seconds, runs, monkeypatch):
    clock, waits = [0.0], []

    def run():
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.queued_milliseconds(run, lambda: waits.append(clock[0]), calls=4, repeats=3)
    assert found == pytest.approx(1e3 * seconds / 4)
    first, second, *others = waits
    assert second - first == pytest.approx(seconds)  # one alone, to see how many
    assert others[1] - others[0] == pytest.approx(runs * seconds, abs=seconds / 2)
