"""Counts the launches of block-sparse attention on an H200, without having one.

    uv run --group machine-code python benchmarks/launches.py

XLA compiles each program for the GPU that tests/pallas/h200.txtpb describes: what is in it runs as
a launch each, kernels of ours and what XLA makes of the arrays around them. bfloat16, batch 1, 16
heads; `shared` patterns are one for all heads, the other ones have one for each. Every block is
listed, which no launch depends on.
"""

import argparse
import os
import re
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from gpu import both
from harness import RESULTS, save
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import sparsax
from sparsax import pallas

HEADS = 16
TARGET = Path(__file__).parents[1] / "tests" / "pallas" / "h200.txtpb"
LAUNCHED = re.compile(r" (custom-call|fusion|sort|scatter|copy|gather|reduce|while)\(")
# Block, pattern heads, options of the call, and whether tokens have segments.
CASES = {
    "blocks": (128, HEADS, {}, False),
    "shared blocks": (128, 1, {}, False),
    "causal": (128, 1, {"causal": True}, False),
    "window": (128, 1, {"window": (256, 256)}, False),
    "segments": (128, 1, {}, True),
    "blocks of 64": (64, 1, {}, False),
    "causal, blocks of 64": (64, 1, {"causal": True}, False),
    "pruned keys as zeros": (128, 1, {"pruned": "zero"}, False),
}


def programs(case: str, length: int, features: int, sharding) -> dict:
    """Forward, and with the backward pass: compiled programs of a case."""
    block, heads, options, segmented = CASES[case]
    blocks = length // block
    pattern = sparsax.BlockPattern.from_block_mask(
        np.ones((heads, blocks, blocks), bool), q_len=length, block_q=block
    )
    argument = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    q = argument(jnp.zeros((1, length, HEADS, features), jnp.bfloat16))
    rest = jax.tree.map(argument, (pattern, jnp.zeros((1, length), jnp.int32)))

    def attend(q, k, v, pattern, ids):
        return sparsax.block_sparse_attention(
            q, k, v, pattern, **options, segment_ids=ids if segmented else None,
            implementation="pallas",
        )  # fmt: skip

    calls = {"forward": (attend, (q, q, q)), "both": (both(attend), (q, q, q, q))}
    return {
        name: jax.jit(call).trace(*arrays, *rest).lower().compile()
        for name, (call, arrays) in calls.items()
    }


def count(text: str) -> tuple[int, int]:
    """All launches of a compiled program, and those of our kernels."""
    entry = text[text.index("\nENTRY") :]
    lines = [line for line in entry.splitlines() if LAUNCHED.search(line)]
    return len(lines), sum('custom_call_target="mosaic_gpu' in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 16384])
    parser.add_argument("--features", type=int, nargs="+", default=[64])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--name", default="launches", help="of the file of results")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where it goes")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    cells = [(c, n, h) for c in args.cases for n in args.lengths for h in args.features]
    rows = []
    for case, length, features in tqdm(cells, unit="program"):
        row = {"case": case, "length": length, "features": features}
        with pallas.lowering():
            made = programs(case, length, features, NamedSharding(mesh, PartitionSpec()))
        for name, program in made.items():
            row[name], row[f"{name}_kernels"] = count(program.as_text())
        rows.append(row)
        tqdm.write(
            f"{case:22s} {length:6d} {features:4d} | forward {row['forward']:3d} of which ours "
            f"{row['forward_kernels']} | both {row['both']:3d}, {row['both_kernels']}"
        )
    print(save(args.name, rows, args.folder))


if __name__ == "__main__":
    main()
