"""Products with factored matrices on this machine's GPU against the dense one, in one run.

    python benchmarks/tsvd_gpu.py              # --quick: two layers, few rows; --resume: go on

bfloat16, random factors, the layers of GPT-2 and Llama-7B. Beside the dense matmul (cuBLAS): plain
SVD of equal budget, two dense matmuls; TSVD through XLA and through the Hopper kernels, two batched
products or one fused kernel, by size of the tiles; TSVD-common on both sides. Milliseconds are
medians over runs of calls inside one program. Up to `--chain` rows, where a call ends before the
next could be dispatched, they are those of a layer in a chain of 16 with weights of their own, up
and down again; "x" is the dense time over the way's. Values of the kernels are compared with those
of the portable implementation first.
"""

import argparse
import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
from gpu import milliseconds, repeated
from resumed import Rows

import sparsax
from sparsax import CommonFactors, TiledFactors, pallas

SHAPES = {
    "gpt2-s up": (768, 3072), "gpt2-s down": (3072, 768), "gpt2-s qkv": (768, 2304),
    "gpt2-m up": (1024, 4096), "gpt2-m down": (4096, 1024), "gpt2-m out": (1024, 1024),
    "gpt2-l up": (1280, 5120), "gpt2-l down": (5120, 1280),
    "llama-7b out": (4096, 4096), "llama-7b up": (4096, 11008), "llama-7b down": (11008, 4096),
}  # fmt: skip
QUICK = ["gpt2-m up", "llama-7b out"]
CHAINED = 16  # layers; too many for the L2 cache where they are large


def draw(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def dense(k: int, n: int, seed: int):
    return (draw(seed, k, n) * k**-0.5,)


def svd(ratio: float, k: int, n: int, seed: int):
    rank = round(k * n / ratio / (k + n))
    return draw(seed, k, rank) * k**-0.5, draw(seed + 1, rank, n) * rank**-0.5


def tiled(size: int, ratio: float, k: int, n: int, seed: int):
    """Factors u, v of square tiles."""
    rank = round(size / (2 * ratio))
    u = draw(seed, k // size, size, n // size, rank) * k**-0.5
    return u, draw(seed + 1, n // size, k // size, rank, size) * rank**-0.5


def common(side: str, size: int, ratio: float, k: int, n: int, seed: int):
    """Factors of the tiles and the common one, in this order."""
    rank = round(size / ratio)
    if side == "right":
        return draw(seed, k, n // size, rank) * k**-0.5, draw(seed + 1, rank, size) * rank**-0.5
    return draw(seed, k // size, rank, n) * k**-0.5, draw(seed + 1, size, rank) * rank**-0.5


def times_tiled(x, u, v, implementation: str):
    factors = TiledFactors(u, v, pad_in=0, pad_out=0)
    return sparsax.tsvd_matmul(x, factors, implementation=implementation)


def times_common(x, tiles, shared, side: str):
    return sparsax.tsvd_common_matmul(x, CommonFactors(tiles, shared, pad=0, side=side))


def scheduled(x, u, v, schedule: str):
    """The kernels' forward pass in one of its forms."""
    options = {"schedule": schedule, "interpret": pallas.interpret()}
    return pallas.tsvd_forward(x, u, v, None, activation=None, **options)


def ways(args, ratio: float, k: int, n: int) -> dict:
    """`(weights of a layer k x n, product)` by name; a tile must divide both."""
    found = {"svd": (partial(svd, ratio), lambda x, u, v: (x @ u) @ v)}
    for side in ("right", "left"):
        make = partial(common, side, args.common_tile, ratio)
        found[f"common {side}"] = make, partial(times_common, side=side)
    for size in (size for size in args.tiles if k % size == n % size == 0):
        make = partial(tiled, size, ratio)
        found[f"xla {size}"] = make, partial(times_tiled, implementation="xla")
        if args.kernels:
            for schedule in ("products", "fused"):
                found[f"{schedule} {size}"] = make, partial(scheduled, schedule=schedule)
    return {name: way for name, way in found.items() if name.split()[0] in args.ways}


def takes(name: str, weights) -> bool:
    """Whether the kernel has a form for these factors."""
    return not name.startswith("fused") or pallas.tsvd.fused.Tiling.of(*weights) is not None


def check(name: str, product, x, weights) -> float:
    """Relative L2 error to the portable implementation's; more than rounding is an error."""
    got, want = (
        jax.jit(product)(x, *weights),
        jax.jit(partial(times_tiled, implementation="xla"))(x, *weights),
    )
    error = jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(
        want.astype(jnp.float32)
    )
    if not error < 1e-2:
        raise SystemExit(f"{name} is wrong: relative error {error}")
    return float(error)


def one_call(make, product, rows: int, k: int, n: int, calls: int) -> float:
    """Milliseconds of the layer."""
    run = repeated(product, calls)
    return milliseconds(run, draw(0, rows, k), *make(k, n, 2), calls=calls)


def in_a_chain(make, product, rows: int, k: int, n: int, calls: int) -> float:
    """Milliseconds of a layer, half of them as they are, half of them back again."""
    product = jax.jit(product)  # compiled once for all layers of a shape: kernels take a while
    layers = [make(*((k, n) if i % 2 == 0 else (n, k)), 2 * i + 2) for i in range(CHAINED)]

    def chain(x, *layers):
        for weights in layers:
            x = product(x, *weights)
        return x

    return milliseconds(repeated(chain, calls), draw(0, rows, k), *layers, calls=calls) / CHAINED


def gradients(product):
    """The product and its gradients of everything."""

    def run(x, *weights):
        y, pull = jax.vjp(product, x, *weights)
        return y, pull(jnp.ones_like(y))

    return run


def measure(args, layer: str, rows: int, ratio: float) -> dict:
    """Everything about one layer, number of rows and compression."""
    k, n = SHAPES[layer]
    time_one = in_a_chain if rows <= args.chain else one_call
    calls = max(2, min(args.calls, 2**36 // (rows * k * n)))
    timed = lambda make, product: time_one(make, product, rows, k, n, calls)
    row = {"layer": layer, "rows": rows, "ratio": ratio, "features": (k, n), "errors": {}}
    row["ms"] = {"dense": timed(dense, jnp.matmul)}
    backward = args.backward and rows > args.chain
    if backward:
        row["both_ms"] = {"dense": timed(dense, gradients(jnp.matmul))}
    for name, (make, product) in ways(args, ratio, k, n).items():
        weights = make(k, n, 2)
        if not takes(name, weights) or not takes(name, make(n, k, 2)):
            continue
        if name.split()[0] in ("products", "fused"):
            row["errors"][name] = check(name, product, draw(0, rows, k), weights)
        row["ms"][name] = timed(make, product)
        if backward and not name.startswith("fused"):
            kernels = partial(times_tiled, implementation="pallas")
            both = gradients(kernels if name.startswith("products") else product)
            row["both_ms"][name] = timed(make, both)
    return row


def show(row: dict) -> None:
    for which in (x for x in ("ms", "both_ms") if x in row):
        whole = row[which]["dense"]
        told = "  ".join(f"{k} {whole / ms:.2f}" for k, ms in row[which].items() if k != "dense")
        where = f"{row['layer']:13s} M={row['rows']:<5d} {row['ratio']:.0f}x {which:7s}"
        print(f"{where} dense {whole:.4f} ms | x {told} | {row['took']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512, 4096, 8192])
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--common-tile", type=int, default=128)
    kinds = ["svd", "common", "xla", "products", "fused"]
    parser.add_argument("--ways", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--chain", type=int, default=16, help="up to so many rows")
    parser.add_argument("--calls", type=int, default=50, help="in one program, at most")
    parser.add_argument(
        "--backward", action="store_true", help="and the gradients, of single calls"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name", default="tsvd_gpu", help="of the result")
    args = parser.parse_args()
    args.kernels = pallas.on_hopper()
    if args.quick:
        args.layers, args.rows, args.tiles = QUICK, [16, 8192], [256, 512]
    done = Rows(args.name, ("layer", "rows", "ratio"), resume=args.resume)
    for layer, rows, ratio in itertools.product(args.layers, args.rows, args.ratios):
        if not done.has(layer=layer, rows=rows, ratio=ratio):
            begin = time.perf_counter()
            show(done.add(begin, measure(args, layer, rows, ratio)))


if __name__ == "__main__":
    main()
