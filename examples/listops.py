"""SPION on ListOps: dense training, pattern search, sparse training, with controls beside it.

    uv run python examples/listops.py            # two minutes on two idle CPU cores
    uv run python examples/listops.py --quick    # the same way in a minute, too short to learn
    uv run python examples/listops.py --full     # sizes of the Long Range Arena: work for a GPU

A dense run finds when its score maps settle. From that very state four runs go on: dense, SPION's
pattern, and two controls that tell whether the search found anything: the diagonal alone and
random blocks of SPION's density. Kill it and start it again: it goes on where it was. On a GPU it
computes in bfloat16 and with blocks of 32, for the Hopper kernels (`--dtype`, `--block`).
"""

import argparse
import dataclasses

from comparison import Size, compare
from sparsax import data

SMALL = Size(
    block=16, quantile=0.9, layers=2, features=64, heads=2, batch_size=16, learning_rate=4e-3,
    probe_every=75, dense_steps=375, sparse_steps=250,
)  # fmt: skip
SMALL_DATA = data.ListOpsConfig(
    min_length=100, max_length=256, num_train=60_000, num_valid=500, num_test=2_000
)
QUICK = dataclasses.replace(SMALL, probe_every=10, dense_steps=40, sparse_steps=20)
QUICK_DATA = dataclasses.replace(SMALL_DATA, num_train=2_000, num_valid=200, num_test=200)
FULL = Size(
    block=64, quantile=0.98, layers=4, features=64, heads=2, batch_size=256, learning_rate=7e-4,
    probe_every=500, dense_steps=5_000, sparse_steps=25_000, dropout=0.1,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute: shows that it runs")
    parser.add_argument("--full", action="store_true", help="the Long Range Arena's sizes")
    Size.add_flags(parser)
    args = parser.parse_args()

    name = "quick" if args.quick else "full" if args.full else "small"
    size = {"quick": QUICK, "full": FULL, "small": SMALL}[name].for_kernels().changed_by(args)
    config = {"quick": QUICK_DATA, "full": data.ListOpsConfig(), "small": SMALL_DATA}[name]
    dataset = data.load_listops(config, args.folder / "cache")
    if args.full:
        dataset = dataset.padded(2048)
    folder = args.folder / f"listops-{name}-{args.variant}-{args.pruned}-{args.seed}"
    compare(
        "ListOps", dataset, size, folder, variant=args.variant, pruned=args.pruned, seed=args.seed
    )


if __name__ == "__main__":
    main()
