"""All programs of the runs of a seed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from spion_compiler import Compiler
from spion_methods import FINDERS, Maps, kind_of, search_of, split_name
from spion_peers import MATERIALISED, arguments, peer_kind
from spion_runs import Runs
from spion_task import head_maps, one_score

from sparsax import BlockPattern
from sparsax.training.run import Run


def compile_all(runs: Runs, compiler: Compiler, methods: list[str], peers: list[str]) -> None:
    """Begins with what the dense phase needs, ends with what only the timed peers need."""
    compile_kind(runs, compiler, "dense")
    for name in methods:
        search = search_of(name)
        if search is not None and search not in compiler.jobs:
            compile_search(runs, compiler, search, split_name(name)[0])
        if kind_of(name) not in compiler.jobs:
            compile_kind(runs, compiler, kind_of(name))
    for name in peers:
        if peer_kind(name) not in compiler.jobs:
            compile_kind(runs, compiler, peer_kind(name))


def compile_kind(runs: Runs, compiler: Compiler, kind: str) -> None:
    """The programs of a kind of method, see `kind_of`, or of the materialised peer."""
    size, run = runs.task.size, of_kind(runs, kind)
    compiler.program(
        kind, "training",
        lambda: run.programs.train.lower(*arguments(run, runs.batch), count=size.steps_per_call),
    )  # fmt: skip
    if kind == MATERIALISED:
        return
    model = nnx.split(run.model(run.params, run.patterns))
    compiler.program(
        kind, "score", lambda: one_score.lower(runs.task.measure, *model, runs.task.valid)
    )
    if kind == "dense":
        tokens = runs.batch(0)[0]
        compiler.program(
            kind, "probe", lambda: run.programs.maps.lower(run.params, run.rest, None, tokens)
        )
        compiler.program(kind, "maps of heads", lambda: head_maps.lower(*model, tokens, size.block))


def of_kind(runs: Runs, kind: str) -> Run:
    """A run of this kind, of any pattern."""
    sharing, _, pruned = kind.partition(" ")
    if kind == MATERIALISED:
        return runs.run("drop", "xla", None)
    if kind == "dense":
        return runs.run("drop", runs.args.dense, None)
    pattern = FINDERS["diagonal"](runs.setting, None)
    if sharing == "heads":
        mask = np.repeat(pattern.to_block_mask(), runs.task.size.heads, axis=1)
        pattern = BlockPattern.from_block_mask(mask, **pattern.geometry)
    return runs.run(pruned, runs.args.dense, pattern)


def compile_search(runs: Runs, compiler: Compiler, kind: str, method: str) -> None:
    """A search, made ready by maps that are drawn; and what `again` needs in the middle."""
    size, blocks = runs.task.size, runs.setting.blocks

    def drawn(heads: int, n: int) -> Any:
        shape = (size.layers, heads, n, n)
        return jnp.asarray(np.random.default_rng(0).random(shape, np.float32))

    def search() -> None:
        maps = Maps(
            whole=drawn(1, size.length) if runs.whole else None, pooled=drawn(1, blocks),
            heads=drawn(size.heads, blocks), final=drawn(1, blocks),
            weights=jnp.ones(size.layers),
        )  # fmt: skip
        FINDERS[method](runs.setting, maps)
        if method == "again":
            runs.search_again(maps.pooled if maps.whole is None else maps.whole)

    compiler.call(kind, search)
    if method == "again":
        run, tokens = of_kind(runs, "shared drop"), runs.batch(0)[0]
        compiler.program(
            kind, "probe",
            lambda: run.programs.maps.lower(run.params, run.rest, run.patterns, tokens),
        )  # fmt: skip
