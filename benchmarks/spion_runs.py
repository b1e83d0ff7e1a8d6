"""What the SPION scripts share: one dense start a seed, and every method going on from it.

Data lies on the device and a call runs many steps, so that a small model is not held up by Python;
all methods of one kind are one compiled program. A run that `--minutes` or a kill ends goes on
where it was when it is started again with the same `--out`.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from resumed import turns_on_gpu
from spion_methods import CONTROLS, FINDERS, Maps, Setting, by_mass, split_name
from spion_rows import row_of
from spion_state import Start, read_start, save_arrays, save_start
from spion_task import Task, configured, head_maps, one_cycle, one_loss, score
from spion_time import Watch, say

from sparsax.nn import score_maps, set_patterns
from sparsax.patterns import layer_weights, mass
from sparsax.training import FitConfig, Schedule, fit
from sparsax.training.run import Run

WHOLE_UP_TO = 4096  # tokens of a score map that is kept token by token


class Runs:
    """The runs of one task and seed."""

    def __init__(self, task: Task, seed: int, args: argparse.Namespace, stop: Callable[[], bool]):
        self.task, self.seed, self.args, self.stop = task, seed, args, stop
        size = task.size
        self.folder = args.out / task.name / str(seed)
        self.turn = turns_on_gpu() if args.beside else contextlib.nullcontext()
        self.batch = task.batches(seed, size.dense_steps + size.steps)
        self.whole = size.length <= WHOLE_UP_TO
        self.setting = Setting.of(size, causal=task.causal, equal_rows=not task.padded, seed=seed)
        self.final = None
        self.made = nnx.split(task.make(seed))

    def fresh(self, pruned: str, dense: str) -> nnx.Module:
        """The model before its training."""
        return configured(nnx.merge(*self.made, copy=True), pruned, dense)

    def run(self, pruned: str, dense: str, pattern: Any) -> Run:
        """What `fit` steps through, for who wants a step alone."""
        run = Run(
            self.fresh(pruned, dense), self.task.loss, self.task.optimizer,
            one_cycle(self.task.size.learning_rate, self.task.size.steps), None, self.probe, None,
            self.seed,
        )  # fmt: skip
        run.patterns = pattern
        return run

    def fit(self, name: str, pruned: str = "drop", *, steps: int, cycle: int, **options: Any):
        """A run, from the start when `options` have one."""
        size = self.task.size
        last = (options.get("start") or {"step": 0})["step"] + steps
        config = FitConfig(
            name=name, steps=last, seed=self.seed, eval_every=size.probe_every, save_every=last,
            log_every=size.steps_per_call, steps_per_call=size.steps_per_call,
            progress=not self.args.no_bar, **options.pop("config", {}),
        )  # fmt: skip
        begin = time.monotonic()
        result = fit(
            self.fresh(pruned, self.args.dense), config=config, loss=self.task.loss,
            batch=self.batch, optimizer=self.task.optimizer,
            learning_rate=one_cycle(size.learning_rate, cycle), probe=self.probe,
            stop=Watch(name, size.steps_per_call, self.stop),
            evaluate=lambda model: score(self.task, model, self.task.valid), **options,
        )  # fmt: skip
        say(f"{name}: at step {result.last['step']} after {time.monotonic() - begin:.1f} s")
        return result

    @functools.cached_property
    def probe(self) -> Callable[..., Any]:
        """How the transition rule reads a model."""
        return probes(None if self.whole else self.task.size.block)

    def begin(self) -> bool:
        """The dense phase; False when time was up."""
        path, dense = self.folder / "start.npz", self.run("drop", self.args.dense, None)
        if not path.exists():
            start = self.dense_phase()
            if start is None:
                return False
            save_start(path, start)
            shutil.rmtree(self.folder / "start")  # larger by far, and not needed any more
        # Read in any case, so that a run that went on elsewhere does what an unbroken one does.
        like = {"params": dense.params, "opt": self.task.optimizer.init(dense.params)}
        self.start = read_start(path, like)
        params, tokens = self.start.state["params"], self.batch(self.start.step)[0]
        self.tokens, self.held = tokens, jax.tree.leaves(self.task.valid)[0][0].astype(tokens.dtype)
        self.probed = dense.maps(params, tokens)
        self.probe_ms = milliseconds(lambda: dense.maps(params, tokens))
        heads = self.head_maps(params, tokens)
        self.maps = Maps(
            whole=self.probed if self.whole else None, pooled=heads.mean(1, keepdims=True),
            heads=heads, final=None,
        )  # fmt: skip
        self.mass = self.masses(params)
        if self.final_path.exists():
            kept = np.load(self.final_path)
            self.end_of_dense(
                jnp.asarray(kept["maps"]), jnp.asarray(kept["mass"]), float(kept["step_seconds"])
            )
        say(f"seed {self.seed}: dense phase of {self.start.step} steps, and its maps, are there")
        return True

    def dense_phase(self) -> Start | None:
        """Trains densely until the transition; None when time was up."""
        size = self.task.size
        schedule = Schedule(
            probe_every=size.probe_every, max_dense_steps=size.dense_steps,
            tolerance=size.tolerance,
        )  # fmt: skip
        found = FINDERS["diagonal"](self.setting, None)
        result = self.fit(
            "start", steps=size.dense_steps, cycle=size.dense_steps + size.steps,
            find_patterns=lambda _: found, folder=self.folder / "start",
            config={"schedule": schedule, "stop_at_transition": True},
        )  # fmt: skip
        if not result.finished:
            return None
        state = {name: result.transition[name] for name in ("params", "opt")}
        seconds = result.step_seconds.get("dense")
        return Start(step=result.transition["step"], state=state, step_seconds=seconds)

    @property
    def final_path(self) -> Path:
        """Where the maps are that dense attention had in the end."""
        return self.folder / "final.npz"

    def end_of_dense(self, maps, mass, step_seconds: float) -> None:
        """Takes in what the oracle reads, `final_mass`, and the time of a dense step.

        The dense phase is timed as well, but while programs are compiled: the faster one counts.
        """
        self.maps, self.final = dataclasses.replace(self.maps, final=maps), mass
        known = [self.start.step_seconds or np.nan, step_seconds]
        if not np.isnan(known).all():
            self.start = dataclasses.replace(self.start, step_seconds=float(np.nanmin(known)))

    def model(self, params, pattern, pruned="drop") -> nnx.Module:
        """A model of these parameters."""
        model = self.fresh(pruned, self.args.dense)
        nnx.update(model, params)
        set_patterns(model, pattern)
        return model

    def head_maps(self, params, tokens):
        """Pooled maps of every head of the dense model."""
        return head_maps(*nnx.split(self.model(params, None)), tokens, self.task.size.block)

    def masses(self, params):
        """The attention mass of every block, on held-out samples."""
        size = self.task.size
        pooled = self.head_maps(params, self.held)
        return mass.block_mass(pooled, block=size.block, length=size.length)

    def row(self, name: str) -> dict | None:
        """Trains a method and says what came of it; None when time was up."""
        method, pruned = split_name(name)
        size, begin = self.task.size, time.perf_counter()
        pattern, facts = None, {}
        start = {**self.start.state, "maps": self.probed, "step": self.start.step}
        options: dict[str, Any] = {"start": start}
        if method.startswith("weighted"):
            facts["weights"], facts["weights_ms"] = self.weigh()
        if method != "dense":
            find = functools.partial(FINDERS[method], self.setting, self.maps)
            pattern = find()
            if method not in CONTROLS:
                facts["search_ms"] = milliseconds(find)
            options["find_patterns"] = lambda _: pattern
        if method == "again":
            middle = size.steps // 2 // size.steps_per_call * size.steps_per_call
            options["config"] = {"search_again": (self.start.step + middle,)}
            options["find_patterns"] = self.search_again
        before = self.model(self.start.state["params"], pattern, pruned)
        facts["before"] = score(self.task, before, self.task.valid)
        say(f"{name}: searched and scored in {time.perf_counter() - begin:.1f} s")
        result = self.fit(name, pruned, steps=size.steps, cycle=size.steps, **options)
        if not result.finished:
            return None
        if method == "dense":
            final = self.head_maps(result.last["params"], self.tokens).mean(1, keepdims=True)
            found = {"maps": final, "mass": self.masses(result.last["params"])}
            found["step_seconds"] = result.step_seconds.get("dense", np.nan)
            self.end_of_dense(**found)
            save_arrays(self.final_path, **found)
        return row_of(self, name, result, facts, time.perf_counter() - begin)

    def weigh(self) -> tuple[list[float], float]:
        """How much the loss minds what each layer loses, and milliseconds of asking it."""
        params = self.start.state["params"]
        model = lambda pattern: nnx.split(self.model(params, pattern))
        loss = lambda pattern: one_loss(self.task.loss, *model(pattern), self.task.valid)
        setting, begin = self.setting, time.perf_counter()
        weights = layer_weights(
            loss, self.maps.pooled, block=setting.block, band=setting.band, causal=setting.causal,
            equal_rows=setting.equal_rows, length=setting.length,
        )  # fmt: skip
        took = 1e3 * (time.perf_counter() - begin)
        self.maps = dataclasses.replace(self.maps, weights=weights)
        return weights.tolist(), took

    def search_again(self, maps):
        """The search by mass in the maps of a probe."""
        return by_mass(self.setting, maps, length=None if self.whole else self.setting.length)


@functools.cache
def probes(pool: int | None) -> Callable[..., Any]:
    """One object for every run, which share programs by it."""
    return functools.partial(score_maps, pool=pool)


def milliseconds(function: Callable[[], Any]) -> float:
    """Of a call after the first."""
    jax.block_until_ready(function())
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return 1e3 * (time.perf_counter() - begin)
