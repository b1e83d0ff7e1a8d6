"""Block-sparse attention on this machine's GPU against dense cuDNN, in one run.

    python benchmarks/attention_gpu.py

bfloat16, batch 1, 16 heads, per-head patterns in blocks of 128. Milliseconds are the medians of
runs of queued calls; TFLOP/s count the listed blocks alone (2 matrix products forward, 7 in all).
Each row also has the milliseconds of every kernel, from the profiler, so that what the kernels
take and what is between them can be told apart.
"""

import argparse
import collections
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import save

import sparsax

BLOCK = 128


def spion_like(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    """A band of three and as many full columns of blocks as the density allows, per head."""
    rng = np.random.default_rng(seed)
    i = np.arange(blocks)
    mask = np.repeat((abs(i - i[:, None]) <= 1)[None], heads, 0)
    wanted = int(density * blocks**2)
    for head in mask:
        for column in rng.permutation(blocks):
            if head.sum() + blocks > wanted:
                break
            head[:, column] = True
    return mask


def window(heads: int, blocks: int, density: float) -> np.ndarray:
    """A band of blocks as wide as the density allows."""
    i = np.arange(blocks)
    return np.repeat((abs(i - i[:, None]) <= density * blocks / 2)[None], heads, 0)


def randomly(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    """Blocks drawn one by one, and the diagonal."""
    drawn = np.random.default_rng(seed).random((heads, blocks, blocks)) < density
    return drawn | np.eye(blocks, dtype=bool)


PATTERNS = {"spion": spion_like, "window": window, "random": randomly}


def milliseconds(function, *args, calls: int = 10, repeats: int = 5) -> float:
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - begin) / calls)
    return 1e3 * float(np.median(found))


def kernels(function, *args, calls: int = 5) -> dict[str, float]:
    """Milliseconds of each GPU kernel of a call, by the profiler."""
    total = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = function(*args)
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "GPU" not in plane.name:
                continue
            for line in (x for x in plane.lines if x.name.startswith("Stream")):
                for event in line.events:
                    total[event.name] += event.duration_ns / 1e6 / calls
    return dict(sorted(total.items(), key=lambda item: -item[1])[:8])


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
    rows = []
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
                    forward = milliseconds(jax.jit(sparse), *arrays[:3], pattern)
                    step = milliseconds(both(sparse), *arrays, pattern)
                    flop = 2 * args.heads * length**2 * features * mask.mean()
                    row = {
                        "features": features, "length": length, "pattern": name,
                        "density": float(mask.mean()), "forward_ms": forward, "both_ms": step,
                        "dense_forward_ms": dense_forward, "dense_both_ms": dense_both,
                        "forward_ratio": dense_forward / forward, "both_ratio": dense_both / step,
                        "kernels_ms": kernels(both(sparse), *arrays, pattern),
                    }  # fmt: skip
                    rows.append(row)
                    print(
                        f"{features:3d} {length:6d} {name:7s} {row['density']:7.3f} {forward:8.3f} "
                        f"{2 * flop / forward / 1e9:7.0f} {row['forward_ratio']:9.2f} "
                        f"{step:12.3f} {7 * flop / step / 1e9:7.0f} {row['both_ratio']:9.2f}",
                        flush=True,
                    )
    print(save("attention_gpu", rows))


if __name__ == "__main__":
    main()
