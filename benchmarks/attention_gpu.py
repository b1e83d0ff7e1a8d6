"""Block-sparse attention on this machine's GPU against dense cuDNN, in one run.

    python benchmarks/attention_gpu.py

bfloat16, batch 1, 16 heads, per-head patterns in blocks of 128. Milliseconds are the medians of
runs of queued calls; TFLOP/s count the listed blocks alone (2 matrix products forward, 7 in all).
Each row also has the milliseconds of every kernel, from the profiler, so that what the kernels
take and what is between them can be told apart.
"""

import argparse

import jax
import jax.numpy as jnp
from gpu import BLOCK, PATTERNS, kernels, milliseconds
from harness import save

import sparsax


def both(attend):
    """Forward and backward as one jitted function of `(q, k, v, do, *rest)`."""

    def run(q, k, v, do, *rest):
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return o, pull(do)

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.25])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    args = parser.parse_args()
    sparse = lambda *x: sparsax.block_sparse_attention(*x, implementation=args.implementation)
    dense = lambda *x: jax.nn.dot_product_attention(*x, implementation=args.dense)
    sparse_forward, sparse_both, rows = jax.jit(sparse), both(sparse), []
    print("  H length pattern density   fwd ms TFLOP/s (x dense)   fwd+bwd ms TFLOP/s (x dense)")
    for features in args.features:
        for length in args.lengths:
            shape = (4, 1, length, args.heads, features)
            arrays = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
            dense_forward = milliseconds(jax.jit(dense), *arrays[:3])
            dense_both = milliseconds(both(dense), *arrays)
            for name in args.patterns:
                for density in args.densities:
                    mask = PATTERNS[name](args.heads, length // BLOCK, density)
                    pattern = sparsax.BlockPattern.from_block_mask(
                        mask, q_len=length, block_q=BLOCK
                    )
                    forward = milliseconds(sparse_forward, *arrays[:3], pattern)
                    step = milliseconds(sparse_both, *arrays, pattern)
                    flop = 2 * args.heads * length**2 * features * mask.mean()
                    row = {
                        "features": features, "length": length, "pattern": name,
                        "density": float(mask.mean()), "forward_ms": forward, "both_ms": step,
                        "dense_forward_ms": dense_forward, "dense_both_ms": dense_both,
                        "forward_ratio": dense_forward / forward, "both_ratio": dense_both / step,
                        "kernels_ms": kernels(sparse_both, *arrays, pattern),
                    }  # fmt: skip
                    rows.append(row)
                    print(
                        f"{features:3d} {length:6d} {name:7s} {row['density']:7.3f} {forward:8.3f} "
                        f"{2 * flop / forward / 1e9:7.0f} {row['forward_ratio']:9.2f} "
                        f"{step:12.3f} {7 * flop / step / 1e9:7.0f} {row['both_ratio']:9.2f}",
                        flush=True,
                    )
            save("attention_gpu", rows)  # what there is, should the run be stopped
    print(save("attention_gpu", rows))


if __name__ == "__main__":
    main()
