"""What a training run does between two looks at it: steps, probes, the best so far."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from sparsax.layouts import BlockPattern
from sparsax.nn import SparseAttention
from sparsax.training.clock import step_seconds
from sparsax.training.programs import as_data, merged, programs


@dataclasses.dataclass
class FitResult:
    """What a run leaves behind.

    Attributes:
        model: the trained model, with its patterns and the parameters of the best evaluation (the
            last ones, when no evaluation gave a number).
        best: highest value that `evaluate` gave, from the transition on; NaN when it gave none.
        patterns: the stacked pattern that was found, or None when there was no search.
        maps: the score maps `[L, P, T, T]` that the pattern was found in, or None.
        transition: the state when the pattern was found: pass it as `start` to another run.
        last: the state after the last step, of the same form.
        log: rows of the log.
        search_seconds: time of the pattern search, compilation not counted.
        step_seconds: median time of a step in each phase, compilation not counted.
        finished: False when `stop` ended the run before its last step.
    """

    model: nnx.Module
    best: float
    patterns: BlockPattern | None
    maps: Any
    transition: dict | None
    last: dict
    log: list[dict]
    search_seconds: float
    step_seconds: dict[str, float]
    finished: bool


class Run:
    """What a run does step by step, and the facts that are not arrays.

    The arrays, `state`, are handed in and out: parameters, optimizer state, the best parameters,
    and while a schedule runs its state and what was copied at the transition.
    """

    def __init__(self, model, loss, optimizer, learning_rate, find_patterns, probe, schedule, seed):
        self.graphdef, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.programs = programs(self.graphdef, loss, optimizer, probe)
        self.rate, self.seed = as_data(learning_rate), jnp.int32(seed)
        self.optimizer, self.find, self.schedule = optimizer, find_patterns, schedule
        self.patterns: BlockPattern | None = None
        self.own_densities = [
            None if layer.pattern.get_value() is None else layer.pattern.get_value().density()
            for _, layer in nnx.iter_modules(model) if isinstance(layer, SparseAttention)
        ]  # fmt: skip
        self.facts = {
            "step": 0, "phase_start": 0, "transition_step": 0, "best": None, "search_seconds": 0.0,
        }  # fmt: skip
        if schedule is not None:
            self._observe = jax.jit(schedule.observe)

    def model(self, params, patterns) -> nnx.Module:
        """A new module of these parameters; with `patterns` None it keeps those it came with."""
        return merged(self.graphdef, params, self.rest, patterns)

    def maps(self, params, example) -> jax.Array:
        """The score maps of these parameters, under the patterns of now."""
        return self.programs.maps(params, self.rest, self.patterns, example)

    @property
    def arrived_sparse(self) -> bool:
        """Whether the model came with a pattern of its own."""
        return any(density is not None for density in self.own_densities)

    @property
    def phase(self) -> str:
        """The phase of the next step."""
        return "dense" if self.patterns is None and not self.arrived_sparse else "sparse"

    @property
    def density(self) -> float:
        """Listed blocks over all blocks, averaged over the layers."""
        if self.patterns is not None:
            return float(self.patterns.density().mean())
        if not self.arrived_sparse:
            return 1.0
        return float(
            np.mean([1.0 if density is None else density for density in self.own_densities])
        )

    def begin(self, start: dict | None, example) -> dict:
        """The state before the first step; `example` is what the model is called with."""
        state = _copy({"params": self.params, "opt": self.optimizer.init(self.params)})
        if start is not None:
            state = _copy({"params": start["params"], "opt": start["opt"]})
            self.facts |= {"step": start["step"], "phase_start": start["step"]}
            self.schedule = None  # its transition is where this run begins
            if self.find is not None:
                self._search(start["maps"])
        state["best"] = _copy(state["params"])
        if self.schedule is not None:
            shape = jax.eval_shape(self.maps, self.params, example).shape
            state["schedule"] = self.schedule.init(shape)
            state["transition"] = _copy({"params": state["params"], "opt": state["opt"]})
        return state

    def train(self, state: dict, batch: Partial, step: int, count: int) -> tuple[dict, dict]:
        """The state after `step`, `count` steps on, and the mean loss and metrics of those."""
        first = step - count + 1
        params, opt, metrics = self.programs.train(
            state["params"], state["opt"], self.rest, self.patterns, batch, self.rate, self.seed,
            jnp.int32(first), jnp.int32(first - 1 - self.facts["phase_start"]), count=count,
        )  # fmt: skip
        self.facts["step"] = step
        return state | {"params": params, "opt": opt}, metrics

    def probe(self, state: dict, example, step: int) -> dict:
        """Looks at the score maps; turns sparse when they have settled, or when time is up."""
        assert self.schedule is not None
        schedule, settled = self._observe(state["schedule"], self.maps(state["params"], example))
        if bool(settled) or self.schedule.forced(step):
            self._search(schedule.maps)
            # What was best while dense says nothing of the sparse model.
            self.facts |= {"phase_start": step, "transition_step": step, "best": None}
            state = state | {"transition": _copy({"params": state["params"], "opt": state["opt"]})}
        return state | {"schedule": schedule}

    def search_again(self, state: dict, example) -> None:
        """Finds the patterns anew in the maps of now; the search before says nothing of them."""
        self._search(self.maps(state["params"], example))
        self.facts["best"] = None

    def _search(self, maps) -> None:
        self.patterns = jax.block_until_ready(self.find(maps))
        begin = time.perf_counter()
        jax.block_until_ready(self.find(maps))  # once more, without compilation
        self.facts["search_seconds"] = time.perf_counter() - begin

    def evaluate(self, state: dict, evaluate, *, last: bool) -> tuple[dict, float]:
        """The state, with the parameters kept if they are the best so far, and their score."""
        score = float(evaluate(self.model(state["params"], self.patterns)))
        best, counts = self.facts["best"], self.schedule is None or self.phase == "sparse" or last
        if counts and (score == score if best is None else score > best):  # NaN is never the best
            self.facts["best"] = score
            state = state | {"best": _copy(state["params"])}
        return state, score

    def result(self, state: dict, rows: list[dict], *, finished: bool) -> FitResult:
        """What the run leaves behind."""
        maps, transition = None, None
        if "schedule" in state:
            maps = state["schedule"].maps
        if self.facts["transition_step"]:
            transition = {
                **state["transition"],
                "maps": maps,
                "step": self.facts["transition_step"],
            }
        best, params = self.facts["best"], state["best"]
        if best is None:
            best, params = float("nan"), state["params"]
        last = {"params": state["params"], "opt": state["opt"], "step": self.facts["step"]}
        return FitResult(
            self.model(params, self.patterns), best, self.patterns, maps, transition, last, rows,
            self.facts["search_seconds"], step_seconds(rows), finished,
        )  # fmt: skip


def _copy(tree: Any) -> Any:
    """The same values in buffers of their own: a training step donates what it is given."""
    return jax.tree.map(jnp.array, tree)
