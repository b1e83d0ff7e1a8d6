"""Training through SPION's phases: dense, pattern search, sparse."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.tree_util import Partial
from tqdm import tqdm

from sparsax.layouts import BlockPattern
from sparsax.nn import score_maps
from sparsax.training.checkpoint import Log, RunFolder
from sparsax.training.clock import Clock
from sparsax.training.programs import given
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
        steps_per_call: steps that the device does without asking Python, in one loop; all other
            numbers of steps must be multiples of it.
        search_again: steps after which a sparse model's patterns are found anew; the learning rate
            goes on. Those that come while a schedule is still dense are passed over.
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
    steps_per_call: int = 1
    search_again: tuple[int, ...] = ()
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
    probe: Callable[[nnx.Module, Any], jax.Array] = score_maps,
    stop: Callable[[], bool] = lambda: False,
    evaluate: Callable[[nnx.Module], float],
    config: FitConfig,
    folder: str | Path | None = None,
    start: dict | None = None,
) -> FitResult:
    """Trains a model, dense at first, and sparse from the moment its score maps settle.

    The log has a row every `log_every` steps, with the loss and the metrics (their mean over the
    steps of a call) and the time of a step, and a row for every evaluation (`valid`). Give `folder`
    and the run survives a kill at any time: started again with the same arguments it goes on from
    its newest checkpoint and ends with the same parameters and patterns. Runs that share model
    structure, loss, optimizer and probe share their compiled programs.

    Args:
        model: holds `sparsax.nn.SparseAttention` layers; its `nnx.Param`s are trained. It may come
            with patterns of its own when there is no schedule.
        loss: `(model, batch, rngs) -> (loss, metrics)`, traced; `rngs` has a dropout stream.
        batch: the batch of a step, a pure function of the step number so that a resumed run sees
            the same data. Its first element is what the model is called with for a probe. With
            `steps_per_call` it is a `jax.tree_util.Partial` that takes a traced step, such as
            `on_device` makes.
        optimizer: gives the descent direction *without* a learning rate, e.g.
            `optax.scale_by_adam()`. Its state is kept at the transition.
        learning_rate: of the step within the phase: the schedule restarts at the transition. A
            `jax.tree_util.Partial` keeps its numbers out of the compiled program.
        find_patterns: from score maps `[L, P, T, T]` to a stacked pattern, e.g.
            `functools.partial(patterns.spion.search, block=64)`. Needed with a schedule.
        probe: the score maps of a model for the first element of a batch, e.g.
            `functools.partial(sparsax.nn.score_maps, per_head=True, pool=64)`.
        stop: asked after every call; True saves the run and ends it there.
        evaluate: a score of the model, higher is better.
        config: steps, schedule, intervals.
        folder: where checkpoints and `log.jsonl` go; None keeps nothing.
        start: `FitResult.transition` of another run: go on from there with the patterns that
            `find_patterns` makes of its maps (dense when `find_patterns` is None).

    Returns:
        The result, see `FitResult`.

    Raises:
        ValueError: a schedule or `search_again` without `find_patterns`, a schedule for a model
            that has patterns already, steps in `search_again` that this run never takes or takes
            densely in any case, numbers of steps that are no multiples of `steps_per_call`, or
            nothing left to train.
    """
    schedule, count = config.schedule, config.steps_per_call
    run = Run(model, loss, optimizer, learning_rate, find_patterns, probe, schedule, config.seed)
    _check_calls(config, batch, 0 if start is None else start["step"])
    _check_search(run, config, start)
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

    last = done >= config.steps or bool(config.stop_at_transition and run.facts["transition_step"])
    bar = tqdm(
        total=config.steps, initial=done, disable=not config.progress, unit="step",
        desc=config.name, dynamic_ncols=True,
    )  # fmt: skip
    clock, shown, compiles = Clock(), {}, True
    for step in range(done + count, 0 if last else config.steps + 1, count):
        now = {"step": step, "phase": run.phase, "density": run.density}
        ahead = batch if isinstance(batch, Partial) else given(batch(step))
        state, metrics = run.train(state, ahead, step, count)
        clock.count(count)
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
        if now["phase"] == "sparse" and step in config.search_again:
            with clock.paused(state):
                run.search_again(state, batch(step)[0])
        last = step == config.steps or (compiles and config.stop_at_transition)
        if step % config.eval_every == 0 or last:
            with clock.paused(state):
                state, score = run.evaluate(state, evaluate, last=last)
            log.write(step=step, phase=run.phase, density=run.density, valid=score)
            shown |= {"valid": score}
        ends = last or stop()
        if disk is not None and (step % config.save_every == 0 or compiles or ends):
            with clock.paused(state):
                disk.save(step, state, {"patterns": run.patterns}, run.facts)
        _show(bar, shown, count)
        if ends:
            break
    bar.close()
    if disk is not None:
        disk.close()
    return run.result(state, log.rows, finished=last)


def _check_calls(config: FitConfig, batch: Callable[..., Any], start: int) -> None:
    count = config.steps_per_call
    if count == 1:
        return
    if count < 1 or not isinstance(batch, Partial):
        raise ValueError(
            "steps_per_call must be at least 1, and above 1 the loop runs on the device, data and "
            "all: batch must be a jax.tree_util.Partial, e.g. sparsax.training.on_device(batches, "
            f"steps); got steps_per_call={count} and batch of type {type(batch).__name__}."
        )
    numbers = {n: getattr(config, n) for n in ("steps", "eval_every", "save_every", "log_every")}
    numbers |= {"start": start} | {
        f"search_again[{i}]": step for i, step in enumerate(config.search_again)
    }
    if config.schedule is not None:
        numbers |= {n: getattr(config.schedule, n) for n in ("probe_every", "max_dense_steps")}
    odd = {name: number for name, number in numbers.items() if number % count}
    if odd:
        raise ValueError(
            f"all numbers of steps must be multiples of steps_per_call={count}; got {odd}."
        )


def _check_search(run: Run, config: FitConfig, start: dict | None) -> None:
    scheduled = run.schedule is not None and start is None
    if run.find is None and (scheduled or config.search_again):
        name = "a schedule" if scheduled else "search_again"
        raise ValueError(f"{name} needs find_patterns, e.g. sparsax.patterns.spion.search.")
    if scheduled and run.arrived_sparse:
        raise ValueError(
            "a schedule starts dense, but the model has patterns already; call "
            "sparsax.nn.set_patterns(model, None) before, or fit with schedule=None."
        )
    if not config.search_again:
        return
    done = 0 if start is None else start["step"]
    if any(not done < step <= config.steps for step in config.search_again):
        raise ValueError(
            f"search_again must name steps of this run, after {done} and up to "
            f"steps={config.steps}; got {config.search_again}."
        )
    dense = config.stop_at_transition if scheduled else start is None and not run.arrived_sparse
    if dense:
        raise ValueError(
            "search_again finds the patterns of a sparse model anew, and this one is dense to its "
            "last step; give a schedule that goes on after the transition, the start of a sparse "
            "phase, or a model with patterns; got "
            f"schedule={config.schedule}, stop_at_transition={config.stop_at_transition}."
        )


def _show(bar: tqdm, facts: dict, steps: int) -> None:
    text = {n: x if isinstance(x, str) else f"{x:.3f}" for n, x in facts.items() if n != "step"}
    bar.set_postfix(text, refresh=False)
    bar.update(steps)
