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


def test_steps_may_be_longer_and_results_too_large_to_wait(monkeypatch):
    x = jnp.ones((8, 8))
    for held in (timing.HELD, 1):
        monkeypatch.setattr(timing, "HELD", held)
        run = timing.repeated(lambda x: x @ x, calls=7, unrolled=3)
        assert run(x) == 8 * 7
        found = re.findall(r"= \S+ dot\(", run.lower(x).compile().as_text())
        assert len(found) == 4  # a step of three, and one behind it


def test_who_is_compared_takes_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def queue(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return timing.Queue(run, lambda: None, calls=2)

    queues = {"one": queue("one", timing.SPAN), "two": queue("two", 2 * timing.SPAN)}
    found = timing.milliseconds_in_turns(queues, repeats=3)
    assert order[4:] == ["one", "two"] * 3  # after two runs of each, to see how many there may be
    assert found == pytest.approx({"one": 500 * timing.SPAN, "two": 1000 * timing.SPAN})


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
