"""Block-sparse attention on this machine's GPU against dense cuDNN, in one run.

    python benchmarks/attention_gpu.py           # --flex: PyTorch's FlexAttention as well

bfloat16, batch 1, 16 heads, per-head patterns in blocks of 128. Milliseconds are medians over runs
of calls inside one jitted loop; TFLOP/s count the listed blocks alone (2 matrix products forward, 7
in all); bytes are what XLA reserves beside the arguments. `causal` lists the lower triangle and
masks its diagonal blocks, beside dense causal attention. Each row also has the milliseconds of
every kernel, from the profiler, so that what the kernels take and what is between them can be told
apart.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flex import flex_attention
from gpu import BLOCK, PATTERNS, kernels, milliseconds, repeated
from harness import save

import sparsax


def both(attend):
    """Forward and backward as one function of `(q, k, v, do, *rest)`."""

    def run(q, k, v, do, *rest):
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return o, pull(do)

    return run


def time_both(attend, arrays, *rest, calls: int, count_bytes: bool = False) -> dict[str, float]:
    """Milliseconds of forward alone and of forward and backward."""
    step = both(attend)
    row = {
        "forward_ms": milliseconds(repeated(attend, calls), *arrays[:3], *rest, calls=calls),
        "both_ms": milliseconds(repeated(step, calls), *arrays, *rest, calls=calls),
    }
    if count_bytes:
        memory = jax.jit(step).lower(*arrays, *rest).compile().memory_analysis()
        row["bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return row


def cases(args, blocks: int):
    """`(name, block mask, causal)` of every pattern and density."""
    for name in args.patterns:
        for density in args.densities:
            yield name, PATTERNS[name](args.heads, blocks, density), False
    if args.causal:
        every = np.ones((args.heads, blocks, blocks), bool)
        yield "full", every, False
        yield "causal", np.tril(every), True


def compare(features: int, length: int, args) -> list[dict]:
    """Rows of every pattern at one head dim and length, each beside dense attention."""
    arrays = jax.random.normal(
        jax.random.key(0), (4, 1, length, args.heads, features), jnp.bfloat16
    )
    calls = max(2, min(50, 2**17 // length))
    sparse = partial(sparsax.block_sparse_attention, implementation=args.implementation)
    dense = partial(jax.nn.dot_product_attention, implementation=args.dense)
    beside, timers, rows = {}, {}, []
    peer = flex_attention(args.heads, length, features, BLOCK) if args.flex else None
    for name, mask, causal in cases(args, length // BLOCK):
        if causal not in beside:
            beside[causal] = time_both(
                partial(dense, is_causal=causal), arrays, calls=calls, count_bytes=True
            )
            timers[causal] = partial(sparse, causal=causal)
        pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=BLOCK)
        row = {
            "features": features, "length": length, "pattern": name, "density": mask.mean().item(),
            **time_both(timers[causal], arrays, pattern, calls=calls, count_bytes=not rows),
            "dense": beside[causal],
            "kernels_ms": kernels(jax.jit(both(timers[causal])), *arrays, pattern),
        }  # fmt: skip
        if peer is not None and not causal:
            row["flex"] = dict(zip(("forward_ms", "both_ms"), peer(mask), strict=True))
        rows.append(row)
        show(row, args.heads)
    return rows


def show(row: dict, heads: int) -> None:
    flop = 2 * heads * row["length"] ** 2 * row["features"] * row["density"]
    line = f"{row['features']:3d} {row['length']:6d} {row['pattern']:8s} {row['density']:7.3f}"
    for which, products in (("forward_ms", 2), ("both_ms", 7)):
        ratios = [f"{row[x][which] / row[which]:6.2f}" for x in ("dense", "flex") if x in row]
        rate = products * flop / row[which] / 1e9
        line += f" | {row[which]:8.3f} {rate:5.0f} {' '.join(ratios)}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.25])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--causal", action="store_true", help="also the full and causal patterns")
    parser.add_argument("--flex", action="store_true", help="also PyTorch's FlexAttention")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--name", default="attention_gpu", help="of the result")
    args = parser.parse_args()
    print("  H length pattern density | forward ms, TFLOP/s, x dense (, x flex) | and backward")
    rows = []
    for features in args.features:
        for length in args.lengths:
            rows += compare(features, length, args)
            save(args.name, rows)  # what there is, should the run be stopped
    print(save(args.name, rows))


if __name__ == "__main__":
    main()
