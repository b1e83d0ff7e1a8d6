"""Products with factored matrices on this machine's GPU against the dense one, in one run.

    python benchmarks/tsvd_gpu.py              # --quick: two layers, few rows; --resume: go on
    python benchmarks/tsvd_gpu.py --layers "gpt2-m up" --beside &    # of others on the same GPU,
    python benchmarks/tsvd_gpu.py --layers "gpt2-m down" --beside    # which compile meanwhile

bfloat16, random factors, the layers of GPT-2 and Llama-7B. Beside the dense matmul (cuBLAS): plain
SVD of equal budget, two dense matmuls; TSVD through XLA and through the Hopper kernels, two batched
products, one fused kernel, or one for few rows, by size of the tiles; TSVD-common on both sides,
through XLA and the same kernels.
Milliseconds are medians over runs of calls inside one program. Up to `--chain` rows, where a call
ends before the next could be dispatched, they are those of a layer in a chain of 16 with weights of
their own, up and down again; "x" is the dense time over the way's. Values of the kernels are
compared with those of the portable implementation first.
"""

import argparse
import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
from resumed import Rows, gpu
from timing import milliseconds, repeated

import sparsax
from sparsax import CommonFactors, TiledFactors, pallas

SHAPES = {
    "gpt2-s up": (768, 3072), "gpt2-s down": (3072, 768), "gpt2-s qkv": (768, 2304),
    "gpt2-m up": (1024, 4096), "gpt2-m down": (4096, 1024), "gpt2-m out": (1024, 1024),
    "gpt2-l up": (1280, 5120), "gpt2-l down": (5120, 1280),
    "llama-7b out": (4096, 4096), "llama-7b up": (4096, 11008), "llama-7b down": (11008, 4096),
}  # fmt: skip
QUICK = ["gpt2-m up", "llama-7b out"]
KERNELS = ("products", "fused", "resident", "split")
COMMON = ("products", "resident")  # those that TSVD-common is timed with, from more rows on
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
    factors = CommonFactors(tiles, shared, pad=0, side=side)
    return sparsax.tsvd_common_matmul(x, factors, implementation="xla")


def scheduled(x, u, v, schedule: str, side: str | None = None):
    """The kernels' forward pass in one of its forms; with a side, of common factors."""
    if side is not None:
        u, v = pallas.as_tiles(u, v, side)
    options = {"schedule": schedule, "interpret": pallas.interpret()}
    return pallas.tsvd_forward(x, u, v, None, activation=None, **options)


def ways(args, ratio: float, k: int, n: int) -> dict:
    """`(weights of a layer k x n, product, portable product or None)`; a tile must divide both.

    By name: of a way, then of a side, then of a size. A kernel has a portable product beside it.
    """
    found = {"svd": (partial(svd, ratio), lambda x, u, v: (x @ u) @ v, None)}
    fitting = lambda sizes: (size for size in sizes if k % size == n % size == 0)
    for side, size in itertools.product(("right", "left"), fitting(args.common_tiles)):
        make, portable = partial(common, side, size, ratio), partial(times_common, side=side)
        found[f"common {side} {size}"] = make, portable, None
        for schedule in COMMON if args.kernels and round(size / ratio) % 16 == 0 else ():
            product = partial(scheduled, schedule=schedule, side=side)
            found[f"common-{schedule} {side} {size}"] = make, product, portable
    for size in fitting(args.tiles):
        make, portable = partial(tiled, size, ratio), partial(times_tiled, implementation="xla")
        found[f"xla {size}"] = make, portable, None
        for schedule in KERNELS if args.kernels else ():
            product = partial(scheduled, schedule=schedule)
            found[f"{schedule} {size}"] = make, product, portable
    wanted = lambda name: name.split()[0].split("-")[0] in args.ways
    return {name: way for name, way in found.items() if wanted(name)}


def takes(name: str, rows: int, weights) -> bool:
    """Whether the kernel has a form for these rows and factors."""
    way, *rest = name.split()
    few = rows <= pallas.tsvd.split.ROWS
    if way == "split" and not few:
        return False
    if way.startswith("common-"):
        if few:
            return False
        way, weights = way.removeprefix("common-"), pallas.shapes_as_tiles(*weights, rest[0])
    form = getattr(pallas.tsvd, way, None)  # the module of a schedule
    return not hasattr(form, "Tiling") or form.Tiling.of(*weights) is not None


def lowered(function, *makers):
    """The function for what the makers make, ready to be compiled: nothing is made yet."""
    return function.lower(*jax.eval_shape(lambda: [x for make in makers for x in make()]))


def relative_error(name: str, got, want) -> float:
    """Relative L2 error; more than rounding is an error."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    found = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    if not found < 1e-2:
        raise SystemExit(f"{name} is wrong: relative error {found}")
    return found


def check(pool, name: str, make, product, portable, rows: int, k: int, n: int):
    """A function that gives the error beside the portable implementation's product.

    What it needs is compiled in the pool, as in the next two.
    """
    x, weights = lambda: [draw(0, rows, k)], lambda: make(k, n, 2)
    compile_ = lambda function: pool.submit(lowered(jax.jit(function), x, weights).compile)
    mine, other = compile_(product), compile_(portable)

    def error() -> float:
        arguments = *x(), *weights()
        return relative_error(name, mine.result()(*arguments), other.result()(*arguments))

    return error


def one_call(pool, make, product, rows: int, k: int, n: int, calls: int):
    """A function that gives the milliseconds of the layer."""
    makers = lambda: [draw(0, rows, k)], lambda: make(k, n, 2)
    run = pool.submit(lowered(repeated(product, calls), *makers).compile)
    given = lambda: [x for make in makers for x in make()]
    return lambda: milliseconds(run.result(), *given(), calls=calls)


def in_a_chain(pool, make, product, rows: int, k: int, n: int, calls: int):
    """The same of a layer in a chain, half of them as they are, half of them back again."""
    shapes = [(k, n) if i % 2 == 0 else (n, k) for i in range(CHAINED)]
    layers = lambda: [make(*shape, 2 * i + 2) for i, shape in enumerate(shapes)]
    product = jax.jit(product)  # compiled once for all layers of a shape: kernels take a while

    def chain(x, *layers):
        for weights in layers:
            x = product(x, *weights)
        return x

    start = lambda: [draw(0, rows, k)]
    run = pool.submit(lowered(repeated(chain, calls), start, layers).compile)
    return lambda: milliseconds(run.result(), *start(), *layers(), calls=calls) / CHAINED


def gradients(product):
    """The product and its gradients of everything."""

    def run(x, *weights):
        y, pull = jax.vjp(product, x, *weights)
        return y, pull(jnp.ones_like(y))

    return run


def start(pool, args, layer: str, rows: int, ratio: float) -> dict:
    """What measures everything about one layer, number of rows and compression, by name."""
    k, n = SHAPES[layer]
    time_one = in_a_chain if rows <= args.chain else one_call
    calls = max(2, min(args.calls, 2**41 // (rows * k * n)))
    timed = lambda make, product: time_one(pool, make, product, rows, k, n, calls)
    backward = args.backward and rows > args.chain
    found = {"errors": {}, "ms": {"dense": timed(dense, jnp.matmul)}}
    if backward:
        found["both_ms"] = {"dense": timed(dense, gradients(jnp.matmul))}
    for name, (make, product, portable) in ways(args, ratio, k, n).items():
        sizes = ((k, n), (n, k)) if rows <= args.chain else ((k, n),)
        shapes = (jax.eval_shape(partial(make, *size, 2)) for size in sizes)
        if not all(takes(name, rows, weights) for weights in shapes):
            continue
        if portable is not None:
            found["errors"][name] = check(pool, name, make, product, portable, rows, k, n)
        found["ms"][name] = timed(make, product)
        if backward and not name.startswith((*KERNELS[1:], "common-")):
            kernels = partial(times_tiled, implementation="pallas")
            both = gradients(kernels if name.startswith("products") else product)
            found["both_ms"][name] = timed(make, both)
    return found


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
    parser.add_argument("--common-tiles", type=int, nargs="+", default=[128, 256, 512])
    kinds = ["svd", "common", "xla", *KERNELS]
    parser.add_argument("--ways", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--chain", type=int, default=16, help="up to so many rows")
    parser.add_argument("--calls", type=int, default=50, help="in one program, at most")
    parser.add_argument(
        "--backward", action="store_true", help="and the gradients, of single calls"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--beside", action="store_true", help="of others like it: take turns")
    parser.add_argument("--name", default="tsvd_gpu", help="of the result")
    args = parser.parse_args()
    args.kernels = pallas.on_hopper()
    if args.quick:
        args.layers, args.rows, args.tiles = QUICK, [16, 8192], [256, 512]
    done = Rows(args.name, ("layer", "rows", "ratio"), resume=args.resume, beside=args.beside)
    turn = gpu if args.beside else lambda *, alone: contextlib.nullcontext()
    for layer, rows in itertools.product(args.layers, args.rows):
        begin, missing = time.perf_counter(), {}
        with turn(alone=False), ThreadPoolExecutor() as pool:  # all are compiled before any runs
            for ratio in args.ratios:
                if not done.has(layer=layer, rows=rows, ratio=ratio):
                    missing[ratio] = start(pool, args, layer, rows, ratio)
        with turn(alone=True):
            for ratio, parts in missing.items():
                row = {"layer": layer, "rows": rows, "ratio": ratio, "features": SHAPES[layer]}
                for part, measured in parts.items():  # errors first
                    row[part] = {name: measure() for name, measure in measured.items()}
                show(done.add(begin, row))
                begin = time.perf_counter()


if __name__ == "__main__":
    main()
