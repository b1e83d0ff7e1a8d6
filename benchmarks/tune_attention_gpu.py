"""Finds the tilings of the block-sparse kernels on this machine's Hopper GPU.

    python benchmarks/tune_attention_gpu.py
    python benchmarks/tune_attention_gpu.py --features 96 --cases spion --beside &
    python benchmarks/tune_attention_gpu.py --features 96 --cases full --beside

For each head dim it times every candidate of the three kernels by the profiler, on a SPION-like
pattern of density 0.1, on the full one, on the causal one with segments, whose tiles need masks, on
BigBird's blocks of 64, and on the compound patterns of QDS and Longformer, the latter with padding,
too; and prints the lines of the tables in `sparsax/pallas/block_sparse/config.py`. Most of the time
goes into compiling: parts of it `--beside` each other share a GPU, and take turns to time. A
candidate whose result differs by more than rounding from that of the table is an error. bfloat16,
16 heads (QDS 12), blocks of 128 but for BigBird.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from compound_gpu import longformer, qds
from gpu import BLOCK, spion_like
from resumed import Rows, turns_on_gpu
from timing import kernels

import sparsax
from sparsax.pallas import compound
from sparsax.pallas.block_sparse import attention, config
from sparsax.pallas.block_sparse.config import TABLE
from sparsax.pallas.block_sparse.tiling import Config, ForwardTiling, KeyTiling, Tiling
from sparsax.patterns.compound import bigbird

# (tile, slots of tiles, of row tiles) that fit in shared memory, by head dim, unless ids are too
# many; for dK and dV a fourth number, `spaces`.
FORWARD = {
    32: [(128, 4, 1), (128, 4, 2), (128, 6, 1)],
    64: [(128, 3, 1), (128, 3, 2), (64, 6, 2)],
    96: [(128, 2, 1), (64, 4, 2)],
    128: [(128, 2, 1), (128, 2, 2)],
    256: [(64, 2, 1), (32, 2, 1)],
}
TEAMS = {64: [(64, 3, 2), (64, 4, 2)]}  # of the forward pass with two teams
DQ = {
    32: [(128, 4, 1), (128, 4, 2), (64, 6, 2)],
    64: [(128, 3, 1), (128, 3, 2), (64, 6, 2)],
    96: [(64, 4, 1), (64, 3, 2)],
    128: [(64, 3, 1), (64, 3, 2)],
    256: [(32, 2, 1), (32, 3, 1)],
}
DKV = {
    32: [(128, 4, 1, 2), (128, 4, 2, 2), (64, 6, 2, 2)],
    64: [(128, 3, 2, 2), (64, 6, 2, 2)],
    96: [(64, 4, 1, 2), (64, 3, 1, 2)],
    128: [(64, 2, 1, 2), (64, 3, 1, 1), (64, 4, 1, 1)],
    256: [(32, 1, 1, 1), (32, 2, 1, 1), (64, 1, 1, 1)],
}
# The cases that decide each table.
TABLES = {
    "TABLE": ("spion", "full"),
    "MASKED": ("causal",),
    "SMALL": ("bigbird",),
    "PLACED": ("padded",),
    "RANGED": ("qds", "longformer"),
}
TABLE_OF = {name: getattr(config, table) for table, names in TABLES.items() for name in names}
KEY = "features", "kernel", "case"  # and the fields of a tiling; no row is looked up
KERNELS = {
    "forward": "block_sparse_forward",
    "dq": "block_sparse_dq",
    "dkv": "block_sparse_dkv",
}


def tilings(choices, kind: type[Tiling] = Tiling) -> list:
    """Every choice as it is, and with turns."""
    return [
        kind(tile, stages, turns, row_slots)
        for tile, stages, row_slots in choices for turns in (False, True)
    ]  # fmt: skip


def key_tilings(features: int) -> list:
    """Those of dK and dV, with and without turns, each with all that may be read early."""
    return [
        KeyTiling(tile, stages, turns, row_slots, early, spaces)
        for tile, stages, row_slots, spaces in DKV[features]
        for turns in (False, True) for early in (0, 1, 2)
    ]  # fmt: skip


def forward_tilings(features: int) -> list:
    """Those of one team, and of two."""
    of_two = (
        ForwardTiling(tile, stages, row_slots=row_slots, teams=2)
        for tile, stages, row_slots in TEAMS.get(features, [])
    )
    return [*tilings(FORWARD[features], ForwardTiling), *of_two]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: `passes` of a configuration, of arrays (q, k, v, do) and operands."""

    passes: Callable
    arrays: tuple
    operands: tuple


def block_passes(chosen: Config):
    """Both passes over the lists of a block pattern, jitted; with ids they are causal too."""

    def options(q, ids):
        return {
            "block_q": BLOCK, "block_kv": BLOCK, "scale": q.shape[-1] ** -0.5,
            "causal": ids is not None, "window": None, "config": chosen,
        }  # fmt: skip

    @jax.jit
    def forward(q, k, v, by_rows, by_columns, ids):
        return attention.forward(q, k, v, *by_rows, *by_columns, ids, ids, **options(q, ids))

    @jax.jit
    def backward(q, k, v, do, o, saved, by_rows, by_columns, ids):
        dlse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
        return attention.backward(
            q, k, v, o, saved, do, dlse, *by_rows, *by_columns, ids, ids, **options(q, ids)
        )

    return forward, backward


def compound_passes(chosen: Config):
    """Both passes over a compound pattern, jitted."""
    options = lambda q: {"scale": q.shape[-1] ** -0.5, "config": chosen}
    own = None, None, None

    @jax.jit
    def forward(q, k, v, pattern):
        return compound.forward(q, k, v, own, pattern, **options(q))

    @jax.jit
    def backward(q, k, v, do, o, saved, pattern):
        return compound.backward(q, k, v, own, o, saved, do, pattern, **options(q))

    return forward, backward


def cases(features: int, length: int, heads: int) -> dict[str, Case]:
    """Every case by name."""

    def draw(*shape):
        return tuple(jax.random.normal(jax.random.key(0), (4, *shape, features), jnp.bfloat16))

    def of_blocks(mask, ids):
        pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=BLOCK)
        by_rows = pattern.kv_num_blocks, pattern.kv_indices
        by_columns = pattern.q_num_blocks, pattern.q_indices
        return Case(block_passes, draw(1, length, heads), (by_rows, by_columns, ids))

    blocks = length // BLOCK
    every = np.ones((heads, blocks, blocks), bool)
    scattered = longformer(4096, 64, True)
    padded = dataclasses.replace(scattered, token_mask=jnp.arange(4096)[None] < 3900)
    segments = jnp.arange(length)[None] // (length // 3)
    return {
        "spion": of_blocks(spion_like(heads, blocks, 0.1), None),
        "full": of_blocks(every, None),
        "causal": of_blocks(np.tril(every), segments),
        "qds": Case(compound_passes, draw(8, 2048, 12), (qds(8),)),
        "longformer": Case(compound_passes, draw(2, 4096, 16), (scattered,)),
        "padded": Case(compound_passes, draw(2, 4096, 16), (padded,)),
        "bigbird": Case(compound_passes, draw(2, 4096, 16), (bigbird(4096, block=64),)),
    }


def of_kernel(name: str, times: dict[str, float]) -> float:
    """Milliseconds of the launches of one kernel."""
    return sum(x for key, x in times.items() if KERNELS[name] in key)


def assert_alike(got, want, tiling) -> None:
    # Tables of rows that are dealt out are no results, and not all of them is written.
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floats = lambda tree: filter(is_float, jax.tree.leaves(tree))
    for x, y in zip(floats(got), floats(want), strict=True):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        there = np.isfinite(y)  # lse of what attends to nothing is not
        error = np.linalg.norm(x[there] - y[there]) / np.linalg.norm(y[there])
        if not error < 1e-2 or not np.array_equal(there, np.isfinite(x)):
            raise AssertionError(f"{tiling} is wrong: relative error {error:.2e}")


def tune(features: int, length: int, heads: int, only: list[str], passes: list[str], turn):
    """Yields the time of every candidate in every case, a row each; nobody else's within `turn`."""

    def row(kernel, tiling, name, times):
        time = of_kernel(kernel, times)
        print(f"  H={features} {name:10s} {kernel:8s} {tiling} {time:.4f} ms", flush=True)
        options = tiling.keywords | {"case": name, "milliseconds": time}
        return {"features": features, "kernel": kernel, **options}

    def alone(run, *args):
        compiled = run.lower(*args).compile()
        with turn:
            return jax.block_until_ready(compiled(*args))

    def times(name, run, args, first, tilings):
        """Of the kernels of a pass; None where shared memory is too small."""
        try:
            run = run.lower(*args).compile()
        except ValueError as error:
            if "shared memory" not in str(error):
                raise
            print(f"  H={features} {name:10s} {tilings} asks for too much memory", flush=True)
            return None
        with turn:
            result = jax.block_until_ready(run(*args))
            found = kernels(run, *args, calls=4)
        assert_alike(result, first, tilings)
        return found

    with turn:
        every = cases(features, length, heads)
    for name, case in every.items():
        if name not in only:
            continue
        kept = TABLE_OF[name][features]
        forward, backward = case.passes(kept)
        args = *case.arrays[:3], *case.operands
        first = alone(forward, *args)
        if "forward" in passes:
            for tiling in forward_tilings(features):
                run, _ = case.passes(Config(tiling, kept.dq, kept.dkv))
                if found := times(name, run, args, first, tiling):
                    yield row("forward", tiling, name, found)
        if set(passes) - {"forward"}:
            args = *case.arrays, *first, *case.operands
            first = alone(backward, *args)
            of_dq = tilings(DQ[features]) if "dq" in passes else []
            of_dkv = key_tilings(features) if "dkv" in passes else []
            for dq, dkv in itertools.zip_longest(of_dq, of_dkv):
                pair = dq or kept.dq, dkv or kept.dkv
                _, run = case.passes(Config(kept.forward, *pair))
                if found := times(name, run, args, first, pair):
                    for kernel, tiling in (("dq", dq), ("dkv", dkv)):
                        if tiling is not None:
                            yield row(kernel, tiling, name, found)


def best(rows: list[dict], features: int, kernel: str, names: tuple[str, ...]) -> Tiling | None:
    """The tiling with the least sum over those cases of time over the least time.

    None if no tiling ran in all of them. Turns, and two teams, must earn one percent to be worth
    their barriers.
    """
    kind = {"forward": ForwardTiling, "dq": Tiling, "dkv": KeyTiling}[kernel]
    times: dict[Tiling, dict[str, float]] = collections.defaultdict(dict)
    for row in rows:
        if (row["features"], row["kernel"]) == (features, kernel) and row["case"] in names:
            known = (field.name for field in dataclasses.fields(kind) if field.name in row)
            tiling = kind(**{name: row[name] for name in known})  # others did not exist yet
            times[tiling][row["case"]] = row["milliseconds"]
    everywhere = {tiling: x for tiling, x in times.items() if set(x) == set(names)}
    if not everywhere:
        return None
    least = {name: min(x[name] for x in everywhere.values()) for name in names}
    plain = lambda x: not x.turns and getattr(x, "teams", 1) == 1
    cost = lambda x: (1 if plain(x) else 1.01) * sum(everywhere[x][n] / least[n] for n in names)
    return min(everywhere, key=cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=sorted(TABLE), choices=TABLE)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    every_case = [name for names in TABLES.values() for name in names]
    parser.add_argument("--cases", nargs="+", default=every_case, choices=every_case)
    parser.add_argument("--passes", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--beside", action="store_true", help="of others like it: take turns")
    parser.add_argument("--name", default="tune_attention_gpu", help="of the result")
    args = parser.parse_args()
    turn = turns_on_gpu() if args.beside else contextlib.nullcontext()
    done = Rows(args.name, KEY, beside=args.beside)
    for features in args.features:
        begin = time.perf_counter()
        for row in tune(features, args.length, args.heads, args.cases, args.passes, turn):
            done.add(begin, row)
            begin = time.perf_counter()
        for table, names in TABLES.items():
            tilings = ", ".join(str(best(done.rows, features, x, names)) for x in KERNELS)
            print(f"    {table} {features}: Config({tilings}),")


if __name__ == "__main__":
    main()
