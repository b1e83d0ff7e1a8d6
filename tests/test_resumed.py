"""Results of benchmarks that are resumed, and what a report says of their figures."""

import math

import pytest

from benchmarks import harness, resumed
from benchmarks.report import origin
from benchmarks.report_compound import told


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Makes the result "r" in a folder of its own."""
    monkeypatch.setattr(resumed, "RESULTS", tmp_path)
    monkeypatch.setattr(resumed, "save", lambda *x: harness.save(*x, folder=tmp_path))
    return lambda resume=False: resumed.Results("r", resume=resume)


def fail():
    raise RuntimeError("out of memory")


def test_what_is_there_is_kept_and_what_failed_is_tried_again(results):
    first = results()
    first.row("a", length=4)
    first.measure("a", "ours", lambda: {"ms": 1.0})
    first.measure("a", "peer", fail)
    again = results(resume=True)
    assert again.row("a", length=5)["length"] == 4
    assert not again.lacks("a", "ours")
    assert again.lacks("a", "peer")
    assert again.lacks("b", "ours")
    again.measure("a", "ours", fail)  # there already
    again.measure("a", "peer", lambda: {"ms": 3.0})
    row = results(resume=True).row("a")
    assert (row["ours"]["ms"], row["peer"]["ms"]) == (1.0, 3.0)
    assert {"took", "command", "commit"} <= row["peer"].keys()
    assert results().rows == {}


def test_a_run_fails_for_parts_that_are_no_peers(results):
    run = results()
    run.measure("a", "ours", lambda: {"ms": 1.0})
    run.measure("a", "peer", fail)
    run.measure("b", "ours", fail)
    run.end("kernels")
    with pytest.raises(SystemExit, match="failed: ours of b; the result says why"):
        run.end("ours", "kernels")
    assert results(resume=True).row("b")["ours"]["error"] == "RuntimeError: out of memory"
    run.measure("b", "ours", lambda: {"ms": 2.0})
    run.end("ours", "kernels")


def test_other_errors_end_a_run(results):
    with pytest.raises(KeyError):
        results().measure("a", "ours", lambda: {}["ms"])


def test_a_figure_is_told_a_dash_or_failed():
    good, bad = {"ms": 1.0}, {"error": "RuntimeError: out of memory"}
    assert told(1.5, good, good) == "1.50"
    assert told(math.nan, good, bad) == "failed"
    assert told(math.nan, good, {}) == told(math.nan, bad, {}) == "-"


def test_an_origin_names_every_command_commit_and_version():
    part = lambda i, **more: {"command": f"c{i}", "commit": f"h{i}", **more}
    record = {
        "command": "c2", "commit": "h2", "device": "gpu", "versions": {"jax": "1"},
        "rows": [{"ours": part(1), "peer": part(2, versions={"torch": "2"})}, {"ours": part(1)}],
    }  # fmt: skip
    want = (
        "`benchmarks/results/r.json`: `c1` and `c2` on one gpu, commit h1 and h2, jax 1, torch 2."
    )
    assert origin("r", record) == want
    assert "`c2` on one gpu, commit h2, jax 1." in origin("r", record | {"rows": []})
