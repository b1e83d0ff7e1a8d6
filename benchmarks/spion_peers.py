"""Time and memory of a training step: dense attention in two ways, and fixed patterns."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from spion_compiler import Compiler
from spion_methods import FINDERS
from spion_time import Deadline, say

from sparsax.training.run import Run

MATERIALISED_UP_TO = 8192  # tokens; beyond, its steps would take minutes to time
MATERIALISED = "dense, materialised"
PEERS = ("dense", "diagonal", "random", "window", "bigbird", "longformer", MATERIALISED)


def missing(rows: list[dict], dense: str) -> list[str]:
    """The peers that have no row yet."""
    known = {row.get("peer") for row in rows}
    if dense == "xla":
        known.add(MATERIALISED)  # that is what dense runs
    return [name for name in PEERS if name not in known]


def peers(runs: Any, names: list[str], deadline: Deadline, compiler: Compiler):
    """Rows of milliseconds and bytes of a step; the loss tells whether the dense ones agree."""
    for name in names:
        compiler.check(peer_kind(name))
        dense = "xla" if name == MATERIALISED else runs.args.dense
        pattern = None if name.startswith("dense") else FINDERS[name](runs.setting, None)
        run = runs.run("drop", dense, pattern)
        timed = pattern is not None or dense != "xla" or runs.task.size.length <= MATERIALISED_UP_TO
        with runs.turn:
            if deadline.over():
                return
            measured = measure(run, runs.batch, runs.task.size.steps_per_call, timed)
        row = {"peer": name, **measured}
        say(str(row))
        yield row


def peer_kind(name: str) -> str:
    """The programs of a peer: of its own, or of a kind of method."""
    if name == MATERIALISED:
        return MATERIALISED
    return "dense" if name == "dense" else "shared drop"


def arguments(run: Run, batch: Any) -> tuple:
    """What the first call of the training program gets."""
    state = run.begin(None, batch(0)[0])
    return (state["params"], state["opt"], run.rest, run.patterns, batch, run.rate, run.seed,
            jnp.int32(1), jnp.int32(0))  # fmt: skip


def measure(run: Run, batch: Any, count: int, timed: bool) -> dict:
    """Milliseconds of a step, its bytes beside parameters and data, the loss of the first steps."""
    compiled = run.programs.train.lower(*arguments(run, batch), count=count).compile()
    memory = compiled.memory_analysis()
    row = {"bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes}
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if not timed or (limit is not None and row["bytes"] > 0.9 * limit):
        return row
    try:
        state, metrics = run.train(run.begin(None, batch(0)[0]), batch, count, count)
        jax.block_until_ready(metrics)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"out_of_memory": True}  # perhaps beside what other processes hold
    row["loss"] = float(metrics["loss"])
    times = []
    for call in (2, 3):
        begin = time.perf_counter()
        state, metrics = run.train(state, batch, call * count, count)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - begin) / count)
    return row | {"ms": 1e3 * min(times)}


def compare_losses(rows: list[dict]) -> None:
    """Says so when flash attention trains otherwise than materialised attention does."""
    losses = {row["peer"]: row.get("loss") for row in rows if "peer" in row}
    one, other = losses.get(MATERIALISED), losses.get("dense")
    if one is not None and other is not None and not abs(one - other) < 0.02 * abs(one):
        raise SystemExit(
            f"dense attention of two kinds must train alike; the mean losses of the first steps "
            f"are {one} and {other}. Take --dense xla, with another --out."
        )
