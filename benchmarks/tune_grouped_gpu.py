"""Finds how the grouped products are best walked on this machine's Hopper GPU.

    python benchmarks/tune_grouped_gpu.py

For each product it times choices of the constants of `sparsax.pallas.grouped_matmul.product` that
fit in shared memory, by the profiler, without what XLA does around the kernel. bfloat16.
"""

import argparse
import itertools

import jax
from grouped_gpu import PRODUCTS, SIZES, check, operands, ours
from harness import save
from timing import kernels

from sparsax.pallas.grouped_matmul import product

BANDS = (4, 8, 16, 32)  # row tiles that share columns in the L2 cache
STAGES = (3, 4)
NAMES = {"gmm": "gmm", "dx": "gmm", "dw": "tgmm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 64])
    args, rows = parser.parse_args(), []
    for groups, band, stages in itertools.product(args.groups, BANDS, STAGES):
        product.BAND, product.STAGES = band, stages
        jax.clear_caches()  # of what was traced with other constants
        sizes = SIZES["skewed"](args.rows, groups)
        given = operands(args.rows, args.features, args.columns, sizes)
        mine, portable = (jax.tree.map(jax.jit, ours(which)) for which in ("pallas", "xla"))
        check(mine, portable, given)
        row = {"groups": groups, "band": band, "stages": stages}
        for name in PRODUCTS:
            found = kernels(mine[name], *given[name])
            row[name] = sum(ms for kernel, ms in found.items() if NAMES[name] in kernel)
        rows.append(row)
        print(row, flush=True)
    print(save("tune_grouped_gpu", rows))


if __name__ == "__main__":
    main()
