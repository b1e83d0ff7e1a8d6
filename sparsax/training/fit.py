"""Training through SPION's phases: dense, pattern search, sparse."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from tqdm import tqdm

from sparsax.layouts import BlockPattern
from sparsax.training.checkpoint import Log, RunFolder
from sparsax.training.clock import Clock
from sparsax.training.run import FitResult, Run
from sparsax.training.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long to train, and how often to look.

    Args:
        steps: optimizer steps in all, dense and sparse together.
        schedule: when to turn sparse; None keeps the model as it comes.
        stop_at_transition: end when the pattern is found; `FitResult.transition` starts the rest.
        eval_every: steps between two evaluations; the last step is evaluated as well.
        save_every: steps between two checkpoints.
        log_every: steps between two rows of the log.
        seed: of dropout.
        name: shown beside the progress bar.
        progress: whether to show it.
    """

    steps: int
    schedule: Schedule | None = None
    stop_at_transition: bool = False
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 20
    seed: int = 0
    name: str = ""
    progress: bool = True


def fit(
    model: nnx.Module,
    *,
    loss: Callable[[nnx.Module, Any, nnx.Rngs], tuple[jax.Array, dict[str, jax.Array]]],
    batch: Callable[[int], Any],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    find_patterns: Callable[[jax.Array], BlockPattern] | None = None,
    evaluate: Callable[[nnx.Module], float],
    config: FitConfig,
    folder: str | Path | None = None,
    start: dict | None = None,
) -> FitResult:
    """Trains a model, dense at first, and sparse from the moment its score maps settle.

    The log has a row every `log_every` steps, with the loss, the metrics and the time of a step,
    and a row for every evaluation (`valid`). Give `folder` and the run survives a kill at any time:
    started again with the same arguments it goes on from its newest checkpoint and ends with the
    same parameters and patterns.

    Args:
        model: holds `sparsax.nn.SparseAttention` layers; its `nnx.Param`s are trained. It may come
            with patterns of its own when there is no schedule.
        loss: `(model, batch, rngs) -> (loss, metrics)`, traced; `rngs` has a dropout stream.
        batch: the batch of a step, a pure function of the step number so that a resumed run sees
            the same data. Its first element is what the model is called with for a probe.
        optimizer: gives the descent direction *without* a learning rate, e.g.
            `optax.scale_by_adam()`. Its state is kept at the transition.
        learning_rate: of the step within the phase: the schedule restarts at the transition.
        find_patterns: from score maps `[L, P, T, T]` to a stacked pattern, e.g.
            `functools.partial(patterns.spion.search, block=64)`. Needed with a schedule.
        evaluate: a score of the model, higher is better.
        config: steps, schedule, intervals.
        folder: where checkpoints and `log.jsonl` go; None keeps nothing.
        start: `FitResult.transition` of another run: go on from there with the patterns that
            `find_patterns` makes of its maps (dense when `find_patterns` is None).

    Returns:
        The result, see `FitResult`.

    Raises:
        ValueError: a schedule without `find_patterns` or for a model that has patterns already, or
            nothing left to train.
    """
    schedule = config.schedule
    run = Run(model, loss, optimizer, learning_rate, find_patterns, schedule, config.seed)
    if schedule is not None and start is None:
        _check_schedule(run)
    disk = None if folder is None else RunFolder(folder)
    log = Log(None if disk is None else disk.path / "log.jsonl")
    state = run.begin(start, batch(0)[0])
    restored = None if disk is None else disk.restore(state)
    if restored is not None:
        state, found, run.facts = restored
        run.patterns = found.get("patterns")
    done = run.facts["step"]
    log.rewind(done)
    if done >= config.steps and restored is None:
        raise ValueError(f"steps={config.steps} leaves nothing to train after {done}.")

    stopped = config.stop_at_transition and run.facts["transition_step"]
    bar = tqdm(
        total=config.steps, initial=done, disable=not config.progress, unit="step",
        desc=config.name, dynamic_ncols=True,
    )  # fmt: skip
    clock, shown, compiles = Clock(), {}, True
    for step in range(done + 1, 0 if stopped else config.steps + 1):
        now = {"step": step, "phase": run.phase, "density": run.density}
        state, metrics = run.train_step(state, batch(step), step)
        clock.step()
        if compiles:
            clock.restart(metrics)
        if step % config.log_every == 0 or step == config.steps:
            seconds = clock.lap(metrics)
            metrics = {name: float(value) for name, value in metrics.items()}
            log.write(**now, seconds=seconds, **metrics)
            shown |= now | metrics
        compiles = False
        if now["phase"] == "dense" and run.schedule is not None and run.schedule.probes(step):
            with clock.paused(state):
                state = run.probe(state, batch(step)[0], step)
            compiles = run.phase == "sparse"
        last = step == config.steps or (compiles and config.stop_at_transition)
        if step % config.eval_every == 0 or last:
            with clock.paused(state):
                state, score = run.evaluate(state, evaluate, last=last)
            log.write(step=step, phase=run.phase, density=run.density, valid=score)
            shown |= {"valid": score}
        if disk is not None and (step % config.save_every == 0 or compiles or last):
            with clock.paused(state):
                disk.save(step, state, {"patterns": run.patterns}, run.facts)
        _show(bar, shown)
        if last:
            break
    bar.close()
    if disk is not None:
        disk.close()
    return run.result(state, log.rows)


def _check_schedule(run: Run) -> None:
    if run.find is None:
        raise ValueError("a schedule needs find_patterns, e.g. sparsax.patterns.spion.search.")
    if run.arrived_sparse:
        raise ValueError(
            "a schedule starts dense, but the model has patterns already; call "
            "sparsax.nn.set_patterns(model, None) before, or fit with schedule=None."
        )


def _show(bar: tqdm, facts: dict) -> None:
    text = {n: x if isinstance(x, str) else f"{x:.3f}" for n, x in facts.items() if n != "step"}
    bar.set_postfix(text, refresh=False)
    bar.update()
