"""How many rows should stay: attention by settings of the schedule on this GPU, in one run.

    python benchmarks/attention_schedule_gpu.py --features 64       # about two minutes

Timed as in `attention_gpu.py`, each pattern with every setting, twice in turn. "pass" has no row
ranked with those of other heads, cuts rows as if there were many, and leaves the last ones to
thread blocks of one row each; with a number, up to so many rows for each multiprocessor stay.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from gpu import BLOCK, PATTERNS, Programs
from harness import save
from timing import UNROLLED

import sparsax
from sparsax.pallas.block_sparse import schedule
from sparsax.pallas.hopper import multiprocessors

SETTINGS = {2048: ("pass", "4"), 4096: ("pass", "4"), 8192: ("pass", "4", "8")}
CASES = [
    ("spion", 0.1), ("window", 0.01), ("window", 0.1), ("random", 0.1), ("bigbird", 0.1),
    ("spion", 0.25), ("random", 0.25), ("bigbird", 0.25),
]  # fmt: skip
HEADS = 16


def uncapped(plan: schedule.Schedule) -> int:
    """Pieces that cutting may add, however few rows there are."""
    cuts = plan.longest >= schedule.LONG and plan.copies < multiprocessors()
    return schedule.PIECES * multiprocessors() // plan.copies if cuts else 0


def listed(length: int, mask: np.ndarray) -> sparsax.BlockPattern:
    return sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=BLOCK)


def start(pool: ThreadPoolExecutor, features: int, length: int, setting: str) -> Programs:
    """Compiles the loops of one setting: settings are read while a program is traced."""
    array = jax.ShapeDtypeStruct((1, length, HEADS, features), jnp.bfloat16)
    every = listed(length, np.ones((HEADS, length // BLOCK, length // BLOCK), bool))
    attend = partial(sparsax.block_sparse_attention, implementation="pallas")
    most = 0 if setting == "pass" else int(setting)
    jax.clear_caches()
    with ExitStack() as stack:
        for name in ("STAY", "STAY_CACHED"):
            stack.enter_context(mock.patch.object(schedule, name, most))
        if setting == "pass":
            stack.enter_context(mock.patch.object(schedule.Schedule, "extra", property(uncapped)))
        calls, unrolled = max(2, min(96, 2**18 // length)), 16 if length <= 2048 else UNROLLED
        return Programs.start(pool, attend, (array,) * 4, every, calls=calls, unrolled=unrolled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--name", default="attention_schedule_gpu", help="of the result")
    args = parser.parse_args()
    rows = []
    for features in args.features:
        with ThreadPoolExecutor() as pool:
            programs = {
                (length, setting): start(pool, features, length, setting)
                for length in args.lengths for setting in SETTINGS[length]
            }  # fmt: skip
        for length in args.lengths:
            blocks = length // BLOCK
            shape = 4, 1, length, HEADS, features
            arrays = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
            for turn in range(2):
                for name, density in CASES:
                    mask = PATTERNS[name](HEADS, blocks, density)
                    row = {"features": features, "length": length, "pattern": name,
                           "density": mask.mean().item(), "turn": turn}  # fmt: skip
                    for setting in SETTINGS[length]:
                        times = programs[length, setting].time(arrays, listed(length, mask))
                        row[setting] = {x: times[x] for x in ("forward_ms", "both_ms")}
                    rows.append(row)
                    told = (f"{x} {1e3 * row[x]['forward_ms']:.1f} {1e3 * row[x]['both_ms']:.1f}"
                            for x in SETTINGS[length])  # fmt: skip
                    print(features, length, name, f"{row['density']:.3f}", *told, flush=True)
                    save(args.name, rows)
    print(save(args.name, rows))


if __name__ == "__main__":
    main()
