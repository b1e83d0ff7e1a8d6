"""The routed feed-forward layer (XLA) against the dense one on this machine's CPU, in one run.

    uv run python benchmarks/routed_ffn_cpu.py

float32, GELU, F = 4 D, 8 blocks of which every token goes through 4, chosen at random. "frozen"
is fine-tuning: the gradient of the input alone, in both layers. Ratios are dense over routed; the
routed layer computes its hidden units again in the backward pass, so that half the blocks allow
2, 1.7 and 1.6 at most. "load" is the machine's load average at the time: above the number of its
cores something else was running, and times are upper bounds.
"""

import argparse
import os

import jax
from harness import measure, save

import sparsax

BLOCKS, ACTIVE = 8, 4


def dense(x, w_up, w_down):
    return jax.nn.gelu(x @ w_up) @ w_down


def routed(x, weights, probabilities):
    plan = sparsax.route_top_k(probabilities, ACTIVE)
    return sparsax.routed_ffn(x, weights, plan, activation="gelu")


def gradient(layer, argnums):
    return jax.grad(lambda x, *rest: (layer(x, *rest[:-1]) * rest[-1]).sum(), argnums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rows = []
    print(
        "    D tokens    pass  dense ms (fastest-slowest)  routed ms (fastest-slowest)  ratio  MiB"
    )
    for features in args.features:
        for tokens in args.tokens:
            keys = jax.random.split(jax.random.key(0), 5)
            x, dy = jax.random.normal(keys[0], (2, tokens, features))
            w_up = jax.random.normal(keys[1], (features, 4 * features)) * features**-0.5
            w_down = jax.random.normal(keys[2], (4 * features, features)) * features**-0.5 / 2
            p = jax.nn.sigmoid(jax.random.normal(keys[3], (tokens, BLOCKS)))
            weights = sparsax.split_ffn(w_up, w_down, BLOCKS)
            passes = {
                "forward": (dense, (x, w_up, w_down), routed, (x, weights, p)),
                "both": (
                    gradient(dense, (0, 1, 2)), (x, w_up, w_down, dy),
                    gradient(routed, (0, 1, 2)), (x, weights, p, dy),
                ),
                "frozen": (
                    gradient(dense, 0), (x, w_up, w_down, dy),
                    gradient(routed, (0, 2)), (x, weights, p, dy),
                ),
            }  # fmt: skip
            for name, (base, base_args, mine, my_args) in passes.items():
                one = measure(base, *base_args, repeats=args.repeats)
                two = measure(mine, *my_args, repeats=args.repeats)
                row = {
                    "features": features, "tokens": tokens, "pass": name, "dense": one,
                    "routed": two, "ratio": one["seconds"] / two["seconds"],
                    "memory_ratio": one["bytes"] / two["bytes"], "load": os.getloadavg()[0],
                }  # fmt: skip
                rows.append(row)
                spread = lambda m: (
                    f"{1e3 * m['seconds']:9.2f} ({1e3 * m['fastest']:7.2f}-"
                    f"{1e3 * m['slowest']:7.2f})"
                )
                print(
                    f"{features:5d} {tokens:6d} {name:>7s} {spread(one)} {spread(two)} "
                    f"{row['ratio']:6.2f} {one['bytes'] / 2**20:5.0f}/{two['bytes'] / 2**20:.0f}",
                    flush=True,
                )
    print(save("routed_ffn_cpu", rows))


if __name__ == "__main__":
    main()
