import dataclasses
import json
import multiprocessing
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import nn, patterns
from sparsax.training import FitResult
from tests.training import killed_run
from tests.training.killed_run import CONFIG, SEARCH, STEPS, TRANSITION, batch, run

SPARSE_SCORES = (1.0, 3.0, 2.0)  # of the evaluations after steps 9, 12, 15
LAST_SCORE = 0.5


@dataclasses.dataclass
class Spied:
    result: FitResult
    folder: Path
    rates: list[int]  # what learning_rate was called with, step by step
    evaluations: list[tuple[bool, list]]  # (was dense, parameters)


def params_of(model) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def assert_equal(got, want) -> None:
    got, want = (jax.tree.leaves(x) for x in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def scripted():
    """An evaluation that loves dense models, and knows in advance what sparse ones are worth."""
    evaluations, scores = [], iter((*SPARSE_SCORES, LAST_SCORE))

    def evaluate(model) -> float:
        dense = nn.get_patterns(model)[0] is None
        evaluations.append((dense, params_of(model)))
        return 100.0 if dense else next(scores)

    return evaluate, evaluations


@pytest.fixture(scope="module")
def spied(tmp_path_factory) -> Spied:
    folder, rates = tmp_path_factory.mktemp("fit"), []
    evaluate, evaluations = scripted()

    def learning_rate(step):
        jax.debug.callback(lambda s: rates.append(int(s)), step, ordered=True)
        return 1e-2 / (1 + step)

    result = run(evaluate=evaluate, learning_rate=learning_rate, folder=folder)
    jax.effects_barrier()
    return Spied(result, folder, rates, evaluations)


def training(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "loss" in row]


def evaluated(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "valid" in row]


def test_goes_from_dense_to_sparse(spied):
    log = training(spied.result.log)
    assert [row["phase"] for row in log] == ["dense"] * TRANSITION + ["sparse"] * TRANSITION
    density = float(spied.result.patterns.density().mean())
    assert 0.25 <= density < 1  # the diagonal, and not everything
    assert [row["density"] for row in log] == [1.0] * TRANSITION + [density] * TRANSITION
    assert set(spied.result.step_seconds) == {"dense", "sparse"}
    assert spied.result.search_seconds > 0


def test_the_learning_rate_restarts_and_the_optimizer_state_does_not(spied):
    assert spied.rates == [*range(TRANSITION), *range(STEPS - TRANSITION)]
    result = spied.result
    assert (result.transition["step"], result.last["step"]) == (TRANSITION, STEPS)
    assert int(result.transition["opt"].count) == TRANSITION
    assert int(result.last["opt"].count) == STEPS


def test_the_best_is_tracked_from_the_transition_on(spied):
    assert [dense for dense, _ in spied.evaluations] == [True, True, False, False, False, False]
    assert spied.result.best == max(SPARSE_SCORES)
    assert_equal(params_of(spied.result.model), spied.evaluations[3][1])
    assert_equal(spied.result.last["params"], spied.evaluations[-1][1])


def test_the_pattern_is_that_of_the_maps_of_the_transition(spied):
    result, model = spied.result, killed_run.make_model()
    nnx.update(model, result.transition["params"])
    maps = nn.score_maps(model, jnp.asarray(batch(TRANSITION)[0]))
    np.testing.assert_allclose(result.maps, maps, rtol=1e-5)  # jitted there, not here
    np.testing.assert_array_equal(result.maps, result.transition["maps"])
    assert_equal(result.patterns, SEARCH(result.maps))
    layers = nn.get_patterns(result.model)
    for layer, pattern in zip(layers, result.patterns.unstack(), strict=True):
        assert_equal(layer, pattern)


def test_log_is_json_lines_in_order(spied):
    rows = [json.loads(x) for x in (spied.folder / "log.jsonl").read_text().splitlines()]
    assert rows == spied.result.log
    steps = training(rows)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in steps)


def test_every_evaluation_has_its_row_the_last_included(spied):
    rows = evaluated(spied.result.log)
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, STEPS]
    assert [row["valid"] for row in rows] == [100.0, 100.0, *SPARSE_SCORES, LAST_SCORE]
    assert [row["phase"] for row in rows] == ["dense"] * 2 + ["sparse"] * 4
    assert spied.result.log[-1] == rows[-1]


def test_a_finished_run_is_read_and_not_trained(spied):
    def never(model):
        raise AssertionError("a finished run is not evaluated again")

    again = run(evaluate=never, folder=spied.folder)
    assert_equal(params_of(again.model), params_of(spied.result.model))
    for name in ("best", "patterns", "maps", "transition", "last"):
        assert_equal(getattr(again, name), getattr(spied.result, name))
    assert again.log == spied.result.log


def test_start_goes_on_as_the_run_it_came_from(spied):
    evaluate, _ = scripted()
    branch = run(
        model=killed_run.make_model(seed=1), evaluate=evaluate, start=spied.result.transition
    )
    assert_equal(branch.last, spied.result.last)
    assert_equal(branch.patterns, spied.result.patterns)
    assert_equal(params_of(branch.model), params_of(spied.result.model))
    assert branch.best == spied.result.best
    strip = lambda rows: [(row["step"], row["phase"], row["loss"]) for row in rows]
    whole = [row for row in training(spied.result.log) if row["step"] > TRANSITION]
    assert strip(training(branch.log)) == strip(whole)


def test_start_without_a_search_stays_dense(spied):
    evaluate, evaluations = scripted()
    config = dataclasses.replace(CONFIG, steps=TRANSITION + 2)
    branch = run(
        start=spied.result.transition, find_patterns=None, evaluate=evaluate, config=config
    )
    assert branch.patterns is None
    assert branch.best == 100.0
    assert [dense for dense, _ in evaluations] == [True, True]
    assert [row["phase"] for row in training(branch.log)] == ["dense", "dense"]


def test_stop_at_transition_ends_when_the_pattern_is_found(spied, tmp_path):
    evaluate, evaluations = scripted()
    config = dataclasses.replace(CONFIG, stop_at_transition=True)
    start = run(config=config, evaluate=evaluate, folder=tmp_path)
    assert start.last["step"] == start.transition["step"] == TRANSITION
    assert_equal(start.patterns, spied.result.patterns)
    assert_equal(start.transition, spied.result.transition)
    # What it ends with is evaluated, and it is sparse.
    assert [dense for dense, _ in evaluations] == [True, True, False]
    assert start.best == SPARSE_SCORES[0]
    assert start.log[-1]["valid"] == SPARSE_SCORES[0]

    again = run(config=config, evaluate=lambda model: pytest.fail("stopped"), folder=tmp_path)
    assert again.last["step"] == TRANSITION
    assert_equal(again.transition, start.transition)
    evaluate, _ = scripted()
    assert_equal(run(start=again.transition, evaluate=evaluate).last, spied.result.last)


def test_a_model_with_patterns_of_its_own_is_sparse_from_the_first_step(tmp_path):
    model = killed_run.make_model()
    nn.set_patterns(model, [patterns.diagonal(32, block=8), None])
    config = dataclasses.replace(CONFIG, steps=3, schedule=None)
    result = run(model=model, config=config, find_patterns=None, folder=tmp_path)
    assert [(row["phase"], row["density"]) for row in result.log] == [("sparse", 0.625)] * 4
    assert set(result.step_seconds) == {"sparse"}
    kept = nn.get_patterns(result.model)
    assert kept[1] is None
    assert_equal(kept[0], patterns.diagonal(32, block=8))


def test_a_schedule_refuses_a_model_that_is_sparse_already():
    model = killed_run.make_model()
    nn.set_patterns(model, patterns.diagonal(32, block=8))
    with pytest.raises(ValueError, match="a schedule starts dense, but the model has patterns"):
        run(model=model)


def test_step_times_are_known_however_often_the_run_looks_aside():
    changes = {"log_every": 4, "eval_every": 2, "save_every": 1}
    config = dataclasses.replace(CONFIG, steps=8, schedule=None, **changes)
    slow = lambda model: time.sleep(0.5) or 1.0
    result = run(config=config, evaluate=slow)
    laps = [row["seconds"] for row in training(result.log)]
    assert len(laps) == 2
    assert all(0 < lap < 0.2 for lap in laps)  # the evaluations would make it 0.25 and more
    assert result.step_seconds == {"dense": np.median(laps)}


def test_a_schedule_needs_a_search():
    with pytest.raises(ValueError, match="a schedule needs find_patterns"):
        run(find_patterns=None)


def test_nothing_left_to_train(spied):
    config = dataclasses.replace(CONFIG, steps=TRANSITION)
    with pytest.raises(ValueError, match=f"steps={TRANSITION} leaves nothing to train after 8"):
        run(start=spied.result.transition, config=config)


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best"), [((1.0, NAN, 0.5), 1.0), ((NAN, 0.5, 0.25), 0.5), ((NAN, NAN, -2.0), -2.0)]
)
def test_nan_is_never_the_best(scores, best):
    left, seen = iter(scores), []
    config = dataclasses.replace(CONFIG, steps=3, eval_every=1, schedule=None)
    result = run(evaluate=lambda model: seen.append(params_of(model)) or next(left), config=config)
    assert result.best == best
    assert_equal(params_of(result.model), seen[scores.index(best)])


def test_without_a_number_the_last_parameters_are_returned():
    config = dataclasses.replace(CONFIG, steps=3, eval_every=1, schedule=None)
    result = run(evaluate=lambda model: NAN, config=config)
    assert np.isnan(result.best)
    assert_equal(params_of(result.model), result.last["params"])


def read_log(folder: Path) -> list[dict]:
    """The rows of a run, but for their times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Starts a process of `killed_run`; all share imports, by a fork, and compiled programs."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_run.__name__])

    def start(folder: Path, out: Path, slow: float):
        process = context.Process(target=killed_run.main, args=(str(folder), str(out), str(slow)))
        process.start()
        return process

    return start


def end_of(process, timeout: float = 120) -> int | None:
    """What the process ends with; None if it did not end in time."""
    process.join(timeout)
    return process.exitcode


def finish(process) -> None:
    try:
        assert end_of(process) == 0
    finally:
        process.kill()  # does nothing to a process that has ended


def wait_for_row(path: Path, step: int, process) -> None:
    """Until the log has a row of that step; a torn last line counts as no row."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.is_alive(), "the run ended before it could be killed"
        if path.exists():
            rows = path.read_text().split("\n")[:-1]
            if rows and json.loads(rows[-1])["step"] >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"no row of step {step} within two minutes")


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path, launch):
    """SIGKILL while dense, in the search, right after the transition, and while sparse."""
    finish(launch(tmp_path / "whole", tmp_path / "whole.npz", 0))
    folder, out = tmp_path / "killed", tmp_path / "killed.npz"
    # Checkpoints: 5, 8 (the transition), 10, 15, 16. The row of step 8 comes before its search.
    for step in (7, TRANSITION, TRANSITION + 1, 13):
        process = launch(folder, out, 0.1)
        try:
            wait_for_row(folder / "log.jsonl", step, process)
        finally:
            process.kill()
        assert end_of(process, 30) == -signal.SIGKILL
    finish(launch(folder, out, 0))

    whole, killed = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "killed"))
    assert set(whole.files) == set(killed.files)
    assert any("patterns" in name for name in whole.files)
    for name in whole.files:
        assert whole[name].dtype == killed[name].dtype, name
        assert whole[name].tobytes() == killed[name].tobytes(), name
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in training(logs[0])] == list(range(1, STEPS + 1))
