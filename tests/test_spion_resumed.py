"""A SPION comparison that was killed goes on elsewhere, and repeats nothing of what is done."""

import json
import lzma
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import spion_compare
import spion_compiler
import spion_runs
import spion_state
import spion_time
from spion_lm_gpu import QUICK, language

METHODS = ["dense", "budget", "oracle"]
SIZE = QUICK.quick(
    length=128, block=16, layers=1, features=16, heads=2, batch_size=2, learning_rate=1e-3
)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    drawn = np.random.default_rng(0)
    for name in ("train", "test"):
        with lzma.open(folder / f"imdb_{name}.jsonl.xz", "wt") as file:
            for _ in range(20):
                text = "".join(chr(97 + x) for x in drawn.integers(0, 26, 200))
                file.write(json.dumps({"text": text}) + "\n")
    return language(folder, SIZE)


def compare(task, folder, **changes):
    flags = {
        "out": folder, "dense": "xla", "methods": METHODS, "minutes": 1e6, "seeds": 1,
        "no_peers": True, "no_bar": True, "beside": False,
    }  # fmt: skip
    spion_compare.compare(task, SimpleNamespace(**(flags | changes)), METHODS)
    return json.loads((folder / f"spion_{task.name}.json").read_text())["rows"][1:]


@pytest.fixture
def trained(monkeypatch):
    """The names of what is trained."""
    names, fit = [], spion_runs.fit

    def spied(*args, config, **options):
        names.append(config.name)
        return fit(*args, config=config, **options)

    monkeypatch.setattr(spion_runs, "fit", spied)
    return names


def results(rows):
    timed = ("seconds", "search_ms", "dense_ms", "sparse_ms", "probe_ms", "search_share")
    return [{n: x for n, x in row.items() if n not in timed} for row in rows]


def test_a_killed_run_goes_on_elsewhere(task, tmp_path, trained, monkeypatch):
    row = spion_runs.Runs.row

    def killed(runs, name):
        if name == "budget":
            raise Killed
        return row(runs, name)

    here, there = tmp_path / "here", tmp_path / "there"
    with monkeypatch.context() as patched:
        patched.setattr(spion_runs.Runs, "row", killed)
        with pytest.raises(Killed):
            compare(task, here)
    assert trained == ["start", "dense"]
    kept = sorted(str(x.relative_to(here)) for x in here.rglob("*") if x.is_file())
    name = f"spion_{task.name}"
    assert kept == ["lm128/0/final.npz", "lm128/0/start.npz", f"{name}.json", f"{name}.npz"]

    shutil.move(here, there)
    resumed = compare(task, there)
    assert trained == ["start", *METHODS]
    assert results(resumed) == results(compare(task, tmp_path / "unbroken"))
    trained.clear()
    assert compare(task, there) == resumed
    assert trained == []


def test_what_cannot_be_finished_is_not_begun(task, tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(spion_time, "BEGIN", spion_time.time.monotonic())
    monkeypatch.setattr(
        spion_compare, "seconds", lambda rows, _: 6e9 if any("method" in x for x in rows) else 0.0
    )
    rows = compare(task, tmp_path)
    assert trained == ["start", "dense"]
    assert [row["method"] for row in rows] == ["dense"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "time is up, left are seed 0: budget, oracle (200000000.0 minutes" in last


def test_without_time_nothing_is_begun(task, tmp_path, trained, capsys):
    assert compare(task, tmp_path, minutes=-1e6) == []
    assert trained == []
    assert "left are seed 0: dense, budget, oracle (time unknown yet)" in capsys.readouterr().out


def test_a_method_takes_as_long_as_its_kind():
    rows = [
        {"task": "lm"}, {"method": "dense", "seconds": 1.0}, {"method": "budget", "seconds": 2.0},
        {"method": "window", "seconds": 4.0}, {"peer": "dense"},
    ]  # fmt: skip
    assert spion_compare.seconds(rows, "dense") == 1.0
    assert spion_compare.seconds(rows, "oracle") == 3.0
    assert spion_compare.seconds(rows, "heads") == 2.0
    assert spion_compare.seconds(rows[:1], "heads") == 0.0


def test_programs_are_made_in_order_and_fail_where_they_are_asked_for():
    order = []

    class Program:
        def __init__(self, name):
            order.append(name)
            self.name = name

        def compile(self):
            if self.name == "bad":
                raise RuntimeError("no such program")

    called = []
    with spion_compiler.Compiler(lambda: False) as compiler:
        for kind in ("one", "bad", "two"):
            compiler.program(kind, "training", lambda kind=kind: Program(kind))
        compiler.call("search", lambda: called.append(1))
    for kind in ("one", "two", "search"):
        compiler.check(kind)
    assert (order, called) == (["one", "bad", "two"], [1])
    with pytest.raises(RuntimeError, match="no such program"):
        compiler.check("bad")


def test_a_start_is_read_as_it_was_written(tmp_path):
    state = {"params": {"w": np.arange(3.0, dtype=np.float32)}, "opt": (np.int32(7),)}
    for seconds in (0.5, None):
        start = spion_state.Start(step=40, state=state, step_seconds=seconds)
        spion_state.save_start(tmp_path / "0" / "start.npz", start)
        read = spion_state.read_start(tmp_path / "0" / "start.npz", state)
        assert (read.step, read.step_seconds) == (40, seconds)
        np.testing.assert_array_equal(read.state["params"]["w"], state["params"]["w"])
        assert int(read.state["opt"][0]) == 7
    assert [x.name for x in (tmp_path / "0").iterdir()] == ["start.npz"]
