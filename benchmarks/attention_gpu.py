"""Block-sparse attention on this machine's GPU against dense cuDNN, in one run.

    python benchmarks/attention_gpu.py
    python benchmarks/attention_gpu.py --flex 16384 --flash4 16384    # beside PyTorch's kernels

bfloat16, batch 1, 16 heads, per-head patterns in blocks of 128. Milliseconds are medians over runs
of calls inside one jitted loop; TFLOP/s count the listed blocks alone (2 matrix products forward, 7
in all); bytes are what XLA reserves beside the arguments. `full` lists every block; `causal` the
lower triangle and masks its diagonal blocks, beside dense causal attention. One compiled program
serves all patterns of a length. One row of each length has the milliseconds of every kernel, from
the profiler, so that what the kernels take and what is between them can be told apart, and what the
portable implementation takes.
"""

import argparse
import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flash4 import flash4_attention
from flex import flex_attention
from gpu import BLOCK, PATTERNS, Programs
from harness import save
from timing import UNROLLED

import sparsax

KINDS = ("forward_ms", "both_ms")
PEERS = ("dense", "flex", "flash4")
PACKAGES = {"flex": ("torch",), "flash4": ("torch", "flash-attn-4", "nvidia-cutlass-dsl")}
DETAILED = "spion", 0.09  # pattern and least density of the row with kernels and portable path


class Length:
    """Everything measured at one head dim and length, compiled before anything is timed."""

    def __init__(self, features: int, length: int, args, pool: ThreadPoolExecutor):
        self.features, self.length, self.args = features, length, args
        self.blocks = length // BLOCK
        self.shape = 1, length, args.heads, features
        array = jax.ShapeDtypeStruct(self.shape, jnp.bfloat16)
        every = self.pattern(np.ones((args.heads, self.blocks, self.blocks), bool))

        def programs(attend, *rest, calls, unrolled=UNROLLED, **options):
            attend = partial(attend, **options)
            return Programs.start(pool, attend, (array,) * 4, *rest, calls=calls, unrolled=unrolled)

        self.sparse, self.dense = {}, {}
        calls = max(2, min(96, 2**18 // length))  # so that starting the loop is nothing beside it
        unrolled = 16 if length <= 2048 else UNROLLED  # nor is a step of it beside short calls
        for causal in (False, True) if length in args.causal else (False,):
            self.sparse[causal] = programs(
                sparsax.block_sparse_attention, every, calls=calls, unrolled=unrolled,
                causal=causal, implementation=args.implementation,
            )  # fmt: skip
            self.dense[causal] = programs(
                jax.nn.dot_product_attention, calls=calls, unrolled=unrolled,
                is_causal=causal, implementation=args.dense,
            )  # fmt: skip
        self.portable = None
        if length in args.portable:
            self.portable = programs(
                sparsax.block_sparse_attention, every, calls=2, implementation="xla"
            )

    def pattern(self, mask: np.ndarray) -> sparsax.BlockPattern:
        """The pattern of a block mask."""
        return sparsax.BlockPattern.from_block_mask(mask, q_len=self.length, block_q=BLOCK)

    def cases(self):
        """`(name, block mask, causal)` of every pattern."""
        for name in self.args.patterns:
            last = 0
            for density in sorted(self.args.densities):
                mask = PATTERNS[name](self.args.heads, self.blocks, density)
                if mask.sum() > last:  # few blocks cannot be all that sparse
                    yield name, mask, False
                last = mask.sum()
        every = np.ones((self.args.heads, self.blocks, self.blocks), bool)
        yield "full", every, False
        if True in self.sparse:
            yield "causal", np.tril(every), True

    def measure(self):
        """Its rows."""
        arrays = jax.random.normal(jax.random.key(0), (4, *self.shape), jnp.bfloat16)
        dense = {causal: programs.time(arrays) for causal, programs in self.dense.items()}
        size = self.args.heads, self.length, self.features, BLOCK
        peers = {
            name: start(*size)
            for name, start, lengths in (
                ("flex", flex_attention, self.args.flex),
                ("flash4", flash4_attention, self.args.flash4),
            ) if self.length in lengths
        }  # fmt: skip
        detailed = False
        for name, mask, causal in self.cases():
            pattern, programs = self.pattern(mask), self.sparse[causal]
            row = {
                "features": self.features, "length": self.length, "pattern": name,
                "density": mask.mean().item(), **programs.time(arrays, pattern),
                "dense": dense[causal],
            }  # fmt: skip
            if name == DETAILED[0] and row["density"] >= DETAILED[1] and not detailed:
                detailed = True
                row["kernels_ms"] = programs.kernels(arrays, pattern)
                if self.portable is not None:
                    row["portable"] = self.portable.time(arrays, pattern)
            for peer, measure in peers.items() if not causal else ():
                versions = {name: importlib.metadata.version(name) for name in PACKAGES[peer]}
                times = zip(KINDS, measure(mask), strict=True)
                row[peer] = dict(times) | {"versions": versions}
            yield row


def show(row: dict, heads: int) -> None:
    flop = 2 * heads * row["length"] ** 2 * row["features"] * row["density"]
    line = f"{row['features']:3d} {row['length']:6d} {row['pattern']:8s} {row['density']:7.3f}"
    for which, products in (("forward_ms", 2), ("both_ms", 7)):
        ratios = [f"{x} {row[x][which] / row[which]:5.2f}" for x in PEERS if x in row]
        rate = products * flop / row[which] / 1e9
        line += f" | {row[which]:8.3f} {rate:5.0f} {' '.join(ratios)}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.25])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    add_lengths = partial(parser.add_argument, type=int, nargs="*", metavar="LENGTH")
    add_lengths("--causal", default=lengths, help="lengths with the causal pattern")
    add_lengths("--portable", default=lengths, help="with the portable path")
    add_lengths("--flex", default=[], help="with PyTorch's FlexAttention")
    add_lengths("--flash4", default=[], help="with FlashAttention-4 (package flash-attn-4)")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--name", default="attention_gpu", help="of the result")
    args = parser.parse_args()
    print("  H length pattern density | forward ms, TFLOP/s, x peers | and backward")
    rows = []
    for features in args.features:
        begin = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            every = [Length(features, length, args, pool) for length in args.lengths]
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        for each in every:
            for row in each.measure():
                rows.append(row)
                show(row, args.heads)
                save(args.name, rows)  # what there is, should the run be stopped
    print(save(args.name, rows))


if __name__ == "__main__":
    main()
