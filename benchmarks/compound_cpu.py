"""Compound attention (XLA) against dense attention on this machine's CPU, in one run.

    uv run python benchmarks/compound_cpu.py

float32, batch 1, 2 heads of 64 features: Longformer, one-sided window of 64 with 32 scattered
global tokens, whatever the length. "growth" is a row over the row before, at twice the length: 2
is linear. "x dense" is dense over sparse.
"""

import argparse

import jax
import numpy as np
from harness import measure, save

import sparsax

HEADS, FEATURES, WINDOW, GLOBALS = 2, 64, 64, 32


def loss_of(attend):
    """The gradient of a weighted sum of the output: a forward and a backward pass."""
    return jax.grad(lambda q, k, v, do, *rest: (attend(q, k, v, *rest) * do).sum(), (0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dense-up-to", type=int, default=4096)
    args = parser.parse_args()
    sparse, dense = sparsax.compound_attention, jax.nn.dot_product_attention
    rows = []
    print("length   fwd ms growth x dense   fwd+bwd ms growth x dense   MiB growth x less")
    for length in args.lengths:
        arrays = jax.random.normal(jax.random.key(0), (4, 1, length, HEADS, FEATURES))
        positions = np.random.default_rng(0).choice(length, GLOBALS, replace=False)[None]
        pattern = sparsax.patterns.compound.longformer(length, window=WINDOW, positions=positions)
        row = {
            "length": length,
            "forward": measure(sparse, *arrays[:3], pattern),
            "both": measure(loss_of(sparse), *arrays, pattern),
        }
        if length <= args.dense_up_to:
            row["dense_forward"] = measure(dense, *arrays[:3])
            row["dense_both"] = measure(loss_of(dense), *arrays)
        before = rows[-1] if rows else None
        rows.append(row)
        line = f"{length:6d}"
        for name, key, unit in (
            ("forward", "seconds", 1e3), ("both", "seconds", 1e3), ("both", "bytes", 2**-20)
        ):  # fmt: skip
            growth = row[name][key] / before[name][key] if before else float("nan")
            peer = row.get(f"dense_{name}", {}).get(key, float("nan")) / row[name][key]
            line += f" {unit * row[name][key]:10.2f} {growth:5.2f} {peer:7.2f}"
        print(line, flush=True)
    print(save("compound_cpu", rows))


if __name__ == "__main__":
    main()
