"""Finds how the products with tiled factors are best computed on this machine's Hopper GPU.

    python benchmarks/tune_tsvd_gpu.py             # --quick: one shape, fewer choices

For each shape it times, by the profiler and without what XLA does around the kernels, choices of
how both batched products are walked (width of a tile, cluster, row tiles that share columns, what
leaves late) and of the kernels that fuse both (`Tiling` of `fused` and `resident`). The best of
each should be what `products.tiles` and `best_schedule` in `sparsax/pallas/tsvd` choose. A choice
whose result differs from the portable one's by more than rounding is an error. bfloat16.
"""

import argparse
import contextlib
import dataclasses
import itertools
import time
from functools import partial

import jax
from resumed import Rows
from timing import kernels
from tsvd_ways import draw, relative_error, tiled, times_tiled

from sparsax import pallas
from sparsax.pallas.grouped_matmul import product
from sparsax.pallas.tsvd import best_schedule, fused, products, resident

# (rows, K, N, tile, compression)
SHAPES = [
    (8192, 4096, 4096, 256, 2), (8192, 4096, 4096, 256, 4), (8192, 4096, 4096, 256, 8),
    (8192, 4096, 4096, 512, 4), (4096, 1024, 4096, 256, 4), (512, 1024, 4096, 256, 4),
    (16, 4096, 4096, 256, 4), (8192, 4096, 4096, 1024, 4), (8192, 4096, 4096, 1024, 8),
    (4096, 1024, 4096, 1024, 4), (4096, 1024, 4096, 1024, 8), (8192, 1024, 4096, 1024, 8),
]  # fmt: skip
BANDS = (8, 16, 32)
CLUSTERS = (1, 2)
BESIDE = (128, 0)


def fused_tilings(u, v) -> list[fused.Tiling]:
    """The default first, then others that fit."""
    default = fused.Tiling.of(u, v)
    if default is None:
        return []
    tilings = itertools.starmap(fused.Tiling, itertools.product((64, 128), range(2, 6), (1, 2, 4)))
    (_, size, num_out, rank), columns = u.shape, v.shape[3]
    return [default] + [
        t for t in tilings if t != default and size % t.depth == 0 and num_out % t.cluster == 0
        and t.bytes(rank, columns) <= fused.SHARED_BYTES
    ]  # fmt: skip


def resident_tilings(rows: int, u, v) -> list[resident.Tiling]:
    """The same of the kernel that keeps `x u` in shared memory."""
    default = resident.Tiling.of(u, v, rows)
    if default is None:
        return []
    rank, columns = u.shape[3], v.shape[3]
    groups = [w // rank for w in resident.WIDTHS if w % rank == columns % w == 0]
    tilings = itertools.starmap(resident.Tiling, itertools.product(groups, (3, 4, 5, 6, 8)))
    return [default] + [
        t for t in tilings if t != default and u.shape[2] % t.group == 0
        and t.runs(u) and t.bytes(u) <= resident.SHARED_BYTES
    ]  # fmt: skip


@contextlib.contextmanager
def constants(width: int, cluster: int, band: int, beside: int):
    """Both products as said; `beside`: the widest tile that leaves beside the next products."""
    before = products.tiles, product.BAND, products.BESIDE
    products.tiles, product.BAND = (lambda *_: (width, cluster)), band
    products.BESIDE = beside
    jax.clear_caches()  # of what was traced with other constants
    try:
        yield
    finally:
        products.tiles, product.BAND, products.BESIDE = before
        jax.clear_caches()


def choices(rows: int, u, v, quick: bool):
    """`(how it is called, function)` of every choice for so many rows and a pair of factors."""
    options = {"activation": None, "interpret": pallas.interpret()}
    plain = lambda: lambda x, u, v: products.forward(x, u, v, None, **options)
    yield {"way": "products", "default": True}, plain()
    columns = u.shape[2] * u.shape[3], v.shape[3]
    for choice in itertools.product(products.STAGES, CLUSTERS, BANDS, BESIDE):
        width, _, band, beside = choice
        usual = (band == product.BAND) + (beside == products.BESIDE)
        same = not beside and width > products.BESIDE  # nothing leaves late in either case
        if same or usual < (2 if quick else 1) or any(c % width for c in columns):
            continue
        how = dict(zip(("width", "cluster", "band", "beside"), choice, strict=True))
        with constants(**how):
            yield {"way": "products"} | how, plain()
    for i, tiling in enumerate(fused_tilings(u, v)):
        if not quick or i < 4:
            how = {"way": "fused", "depth": tiling.depth, "stages": tiling.stages,
                   "cluster": tiling.cluster}  # fmt: skip
            yield (
                how,
                lambda x, u, v, tiling=tiling: fused.forward(
                    x, u, v, None, tiling=tiling, **options
                ),
            )
    for i, tiling in enumerate(resident_tilings(rows, u, v)):
        if not quick or i < 4:
            run = partial(resident.forward, bias=None, tiling=tiling, **options)
            yield {"way": "resident"} | dataclasses.asdict(tiling), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    ways = ["products", "fused", "resident"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--name", default="tune_tsvd_gpu", help="of the result")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    done = Rows(args.name, ("shape", "how"), resume=args.resume)
    for shape in [SHAPES[i] for i in (args.shapes[:2] if args.quick else args.shapes)]:
        rows, k, n, size, ratio = shape
        x, (u, v) = draw(0, rows, k), tiled(size, ratio, k, n, 2)
        want = jax.jit(partial(times_tiled, implementation="xla"))(x, u, v)
        print(*shape, "default:", best_schedule(rows, u, v), flush=True)
        for how, run in choices(rows, u, v, args.quick):
            if how["way"] not in args.ways or done.has(shape=list(shape), how=how):
                continue
            begin = time.perf_counter()
            run = jax.jit(run)
            error = relative_error(str(how), run(x, u, v), want)
            found = kernels(run, x, u, v)
            row = {"shape": list(shape), "how": how, "error": error, "kernels_ms": found,
                   "ms": sum(ms for name, ms in found.items() if "tsvd" in name)}  # fmt: skip
            done.add(begin, row)
            print(f"{row['ms']:8.4f} ms  {how}  {row['took']} s", flush=True)
        mine = [row for row in done.rows if row["shape"] == list(shape)]
        for way in args.ways:
            if best := [row for row in mine if row["how"]["way"] == way]:
                row = min(best, key=lambda row: row["ms"])
                print(f"best {way}: {row['ms']:.4f} ms {row['how']}", flush=True)


if __name__ == "__main__":
    main()
