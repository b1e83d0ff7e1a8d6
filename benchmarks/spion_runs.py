"""What the SPION scripts share: one dense start a seed, and every method going on from it.

Data lies on the device and a call runs many steps, so that a small model is not held up by Python;
all methods of one kind are one compiled program. A run that `--minutes` or a kill ends goes on
where it was when it is started again with the same `--out`.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from spion_methods import CONTROLS, FINDERS, Maps, Setting, by_mass, split_name
from spion_peers import arguments
from spion_task import Task, configured, one_cycle, one_score, score

from sparsax import BlockPattern
from sparsax.nn import score_maps, set_patterns
from sparsax.patterns import mass, quality
from sparsax.training import FitConfig, FitResult, Schedule, fit
from sparsax.training.run import Run

WHOLE_UP_TO = 4096  # tokens of a score map that is kept token by token


@functools.partial(jax.jit, static_argnums=(0, 3))
def _head_maps(graphdef, state, tokens, block):
    return score_maps(nnx.merge(graphdef, state), tokens, per_head=True, pool=block)


class Runs:
    """The runs of one task and seed."""

    def __init__(self, task: Task, seed: int, args: argparse.Namespace, stop: Callable[[], bool]):
        self.task, self.seed, self.args, self.stop = task, seed, args, stop
        size = task.size
        self.batch = task.batches(seed, size.dense_steps + size.steps)
        self.whole = size.length <= WHOLE_UP_TO
        self.setting = Setting.of(size, causal=task.causal, equal_rows=not task.padded, seed=seed)
        self.start = self.final = None

    def run(self, pruned: str, dense: str, pattern: Any) -> Run:
        """What `fit` steps through, for who wants a step alone."""
        run = Run(
            configured(self.task.make(self.seed), pruned, dense), self.task.loss,
            self.task.optimizer, one_cycle(self.task.size.learning_rate, self.task.size.steps),
            None, self.probe, None, self.seed,
        )  # fmt: skip
        run.patterns = pattern
        return run

    def compile(self, pruned: str, kind: str) -> None:
        """Makes the programs of a kind of method, which all of them will find compiled.

        Args:
            pruned: what pruned keys count.
            kind: "shared" patterns, a pattern for every one of the "heads", or dense attention
                "materialised".
        """
        pattern, dense = FINDERS["diagonal"](self.setting, None), self.args.dense
        if kind == "heads":
            mask = np.repeat(pattern.to_block_mask(), self.task.size.heads, axis=1)
            pattern = BlockPattern.from_block_mask(mask, **pattern.geometry)
        elif kind == "materialised":
            pattern, dense = None, "xla"
        run = self.run(pruned, dense, pattern)
        program = run.programs.train.lower(
            *arguments(run, self.batch), count=self.task.size.steps_per_call
        )
        program.compile()
        if pattern is not None:
            parts = nnx.split(run.model(run.params, pattern))
            one_score.lower(self.task.measure, *parts, self.task.valid).compile()

    def fit(self, name: str, pruned: str = "drop", *, steps: int, cycle: int, **options: Any):
        """A run, from the start when `options` have one."""
        size, folder = self.task.size, self.args.out / self.task.name / str(self.seed)
        last = (options.get("start") or {"step": 0})["step"] + steps
        config = FitConfig(
            name=name, steps=last, seed=self.seed, eval_every=size.probe_every, save_every=last,
            log_every=size.steps_per_call, steps_per_call=size.steps_per_call,
            progress=not self.args.no_bar, **options.pop("config", {}),
        )  # fmt: skip
        return fit(
            configured(self.task.make(self.seed), pruned, self.args.dense), config=config,
            loss=self.task.loss, batch=self.batch, optimizer=self.task.optimizer,
            learning_rate=one_cycle(size.learning_rate, cycle), stop=self.stop, probe=self.probe,
            evaluate=lambda model: score(self.task, model, self.task.valid),
            folder=folder / name.replace(":", "-"), **options,
        )  # fmt: skip

    @functools.cached_property
    def probe(self) -> Callable[..., Any]:
        """How the transition rule reads a model."""
        return probes(None if self.whole else self.task.size.block)

    def begin(self) -> bool:
        """The dense phase; False when time was up."""
        size = self.task.size
        schedule = Schedule(
            probe_every=size.probe_every, max_dense_steps=size.dense_steps,
            tolerance=size.tolerance,
        )  # fmt: skip
        found = FINDERS["diagonal"](self.setting, None)
        start = self.fit(
            "start", steps=size.dense_steps, cycle=size.dense_steps + size.steps,
            find_patterns=lambda _: found,
            config={"schedule": schedule, "stop_at_transition": True},
        )  # fmt: skip
        if not start.finished:
            return False
        self.start, transition = start, start.transition
        self.step = transition["step"]
        tokens = self.batch(self.step)[0]
        self.tokens, self.held = tokens, jax.tree.leaves(self.task.valid)[0][0]
        heads = self.head_maps(transition["params"], tokens)
        self.maps = Maps(
            whole=start.maps if self.whole else None, pooled=heads.mean(1, keepdims=True),
            heads=heads, final=None,
        )  # fmt: skip
        self.mass = self.masses(transition["params"])
        run = self.run("drop", self.args.dense, None)
        self.probe_ms = milliseconds(lambda: run.maps(transition["params"], tokens))
        return True

    def model(self, params, pattern, pruned="drop") -> nnx.Module:
        """A model of these parameters."""
        model = configured(self.task.make(self.seed), pruned, self.args.dense)
        nnx.update(model, params)
        set_patterns(model, pattern)
        return model

    def head_maps(self, params, tokens):
        """Pooled maps of every head of the dense model."""
        return _head_maps(*nnx.split(self.model(params, None)), tokens, self.task.size.block)

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
        options: dict[str, Any] = {"start": self.start.transition}
        if method != "dense":
            find = functools.partial(FINDERS[method], self.setting, self.maps)
            pattern = find()
            if method not in CONTROLS:
                facts["search_ms"] = milliseconds(find)
            options["find_patterns"] = lambda _: pattern
        if method == "again":
            middle = size.steps // 2 // size.steps_per_call * size.steps_per_call
            options["config"] = {"search_again": (self.step + middle,)}
            options["find_patterns"] = self.search_again
        before = self.model(self.start.transition["params"], pattern, pruned)
        facts["before"] = score(self.task, before, self.task.valid)
        result = self.fit(name, pruned, steps=size.steps, cycle=size.steps, **options)
        if not result.finished:
            return None
        if method == "dense":
            final = self.head_maps(result.last["params"], self.tokens).mean(1, keepdims=True)
            self.maps = dataclasses.replace(self.maps, final=final)
            self.final = self.masses(result.last["params"])
        return self.report(name, result, facts, time.perf_counter() - begin)

    def search_again(self, maps):
        """The search by mass in the maps of a probe."""
        return by_mass(self.setting, maps, length=None if self.whole else self.setting.length)

    def report(self, name: str, result: FitResult, facts: dict, seconds: float) -> dict:
        """The row of a trained method."""
        size, pattern = self.task.size, result.patterns
        blocks = self.setting.blocks
        listable = mass.bands(blocks, 0, self.task.causal)[1].sum() / blocks**2
        density = np.ones(size.layers)  # of what may be listed
        if pattern is not None:
            density = np.asarray(pattern.density()) / listable
        measured = {}
        if pattern is not None:
            measured["mass"] = quality.pattern_mass(pattern, self.mass)
            measured["best_mass"] = quality.best_mass(pattern, self.mass)
            if self.final is not None:
                measured["final_mass"] = quality.pattern_mass(pattern, self.final)
        # A run that was ended all the time has no steps that were timed.
        times = {"dense": None, "sparse": None} | self.start.step_seconds | result.step_seconds
        ms = {phase: None if x is None else 1e3 * x for phase, x in times.items()}
        now = ms["dense" if pattern is None else "sparse"]
        share = None
        if ms["dense"] is not None and now is not None:
            searches = 2 if name.startswith("again") else 1  # the second one has a probe of its own
            looks = -(-self.step // size.probe_every) + searches - 1
            looked = self.probe_ms * looks + facts.get("search_ms", 0.0) * searches
            share = looked / (ms["dense"] * self.step + now * size.steps)
        return {
            "seed": self.seed, "method": name,
            "score": score(self.task, result.model, *self.task.test), "best_valid": result.best,
            **facts, "density": density.tolist(),
            **{n: np.asarray(x).tolist() for n, x in measured.items()}, "transition": self.step,
            "dense_ms": ms["dense"], "sparse_ms": ms["sparse"], "probe_ms": self.probe_ms,
            "search_share": share,
            # Of one sample, forward, whole blocks.
            "attention_mflop": 4e-6 * size.length**2 * size.features * float(
                (listable * density).sum()
            ),
            "seconds": seconds,
            "loss": [[x["step"], x["loss"]] for x in result.log if "loss" in x],
            "valid": [[x["step"], x["valid"]] for x in result.log if "valid" in x],
        }  # fmt: skip


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
