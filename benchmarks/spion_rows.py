"""The row of a method of the SPION comparison."""

from typing import Any

import numpy as np
from spion_task import score

from sparsax.patterns import mass, quality
from sparsax.training import FitResult


def row_of(runs: Any, name: str, result: FitResult, facts: dict, seconds: float) -> dict:
    """The row of a trained method."""
    size, step, pattern = runs.task.size, runs.start.step, result.patterns
    blocks = runs.setting.blocks
    listable = mass.bands(blocks, 0, runs.task.causal)[1].sum() / blocks**2
    density = np.ones(size.layers)  # of what may be listed
    if pattern is not None:
        density = np.asarray(pattern.density()) / listable
    measured = {}
    if pattern is not None:
        measured["mass"] = quality.pattern_mass(pattern, runs.mass)
        measured["best_mass"] = quality.best_mass(pattern, runs.mass)
        if runs.final is not None:
            measured["final_mass"] = quality.pattern_mass(pattern, runs.final)
    # A run that was ended all the time has no steps that were timed.
    times = {"dense": runs.start.step_seconds, "sparse": None} | result.step_seconds
    ms = {phase: None if x is None else 1e3 * x for phase, x in times.items()}
    now = ms["dense" if pattern is None else "sparse"]
    share = None
    if ms["dense"] is not None and now is not None:
        searches = 2 if name.startswith("again") else 1  # the second one has a probe of its own
        looks = -(-step // size.probe_every) + searches - 1
        looked = runs.probe_ms * looks + facts.get("search_ms", 0.0) * searches
        share = looked / (ms["dense"] * step + now * size.steps)
    return {
        "seed": runs.seed, "method": name,
        "score": score(runs.task, result.model, *runs.task.test), "best_valid": result.best,
        **facts, "density": density.tolist(),
        **{n: np.asarray(x).tolist() for n, x in measured.items()}, "transition": step,
        "dense_ms": ms["dense"], "sparse_ms": ms["sparse"], "probe_ms": runs.probe_ms,
        "search_share": share,
        # Of one sample, forward, whole blocks.
        "attention_mflop": 4e-6 * size.length**2 * size.features * float(
            (listable * density).sum()
        ),
        "seconds": seconds,
        "loss": [[x["step"], x["loss"]] for x in result.log if "loss" in x],
        "valid": [[x["step"], x["valid"]] for x in result.log if "valid" in x],
    }  # fmt: skip
