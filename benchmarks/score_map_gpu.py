"""The score map on this machine's GPU beside a dense training step of the layer, in one run.

    python benchmarks/score_map_gpu.py

bfloat16, batch 1, 16 heads. Milliseconds are medians over runs of calls inside one jitted loop;
bytes are what XLA reserves beside the arguments. "full" is the map of every pair, "pooled" the
means of its blocks of 64 alone; "dense" is cuDNN's attention, forward and backward: what a probe
delays. TFLOP/s count the two products of the two passes. Maps are compared with the portable
implementation first, where that is run; each row has the milliseconds of every kernel as well.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from gpu import both
from harness import save
from timing import kernels, milliseconds, repeated

import sparsax

POOL = 64


def time_map(make, q, k, calls: int) -> dict:
    """Milliseconds and bytes of a call of the map, and the milliseconds of its kernels."""
    row = {
        "ms": milliseconds(repeated(make, calls), q, k, calls=calls),
        "bytes": reserved(make, q, k),
    }
    if jax.default_backend() == "gpu":
        row["kernels_ms"] = kernels(jax.jit(make), q, k)
    return row


def reserved(function, *args) -> int:
    """Bytes of temporaries and outputs."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def check(make, peer, q, k) -> float:
    """Relative L2 error of one map to another; more than float32 sums differ by is an error."""
    got, want = jax.jit(make)(q, k), jax.jit(peer)(q, k)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    if not error < 1e-4:
        raise SystemExit(f"the map is wrong: relative error {error}")
    return error


def compare(features: int, length: int, args) -> dict:
    """Everything about one head dim and length."""
    arrays = jax.random.normal(
        jax.random.key(0), (4, 1, length, args.heads, features), jnp.bfloat16
    )
    q, k = arrays[:2]
    calls = max(2, min(50, 2**17 // length))
    row: dict = {"features": features, "length": length}
    for causal in (False, True):
        of = partial(sparsax.score_map, causal=causal)
        maps = {
            "full": partial(of, implementation=args.implementation),
            "pooled": partial(of, pool=POOL, implementation=args.implementation),
        }
        found = {name: time_map(make, q, k, calls) for name, make in maps.items()}
        if length <= args.xla_up_to:
            portable = partial(of, implementation="xla")
            for name, make in maps.items():
                peer = partial(portable, pool=POOL) if name == "pooled" else portable
                found[name]["error"] = check(make, peer, q, k)
            found["xla"] = time_map(portable, q, k, max(2, calls // 10))
        dense = partial(jax.nn.dot_product_attention, implementation=args.dense, is_causal=causal)
        step = both(dense)
        found["dense"] = {
            "ms": milliseconds(repeated(step, calls), *arrays, calls=calls),
            "bytes": reserved(step, *arrays),
        }
        row["causal" if causal else "bidirectional"] = found
        show(row, found, causal, args.heads)
    return row


def show(row: dict, found: dict, causal: bool, heads: int) -> None:
    flop = 4 * heads * row["length"] ** 2 * row["features"] / (2 if causal else 1)
    line = f"{row['features']:3d} {row['length']:6d} {'causal' if causal else 'all':6s}"
    for name, told in found.items():
        line += f" | {name} {told['ms']:8.3f} ms {told['bytes'] / 2**20:8.1f} MiB"
        line += f" {flop / told['ms'] / 1e9:4.0f} TFLOP/s" if name in ("full", "pooled") else ""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--xla-up-to", type=int, default=4096, help="length")
    args, rows = parser.parse_args(), []
    for features in args.features:
        for length in args.lengths:
            rows.append(compare(features, length, args))
            save("score_map_gpu", rows)  # what there is, should the run be stopped
    print(save("score_map_gpu", rows))


if __name__ == "__main__":
    main()
