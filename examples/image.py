"""SPION on images as sequences of gray pixels: the comparison of listops.py on another task.

    uv run python examples/image.py                       # scikit-learn's 8 x 8 digits
    uv run python examples/image.py --data FOLDER         # CIFAR-10 gray, some five minutes
    uv run python examples/image.py --data FOLDER --full  # sizes of the Long Range Arena

FOLDER holds cifar10_gray_train.npy.xz and cifar10_gray_test.npy.xz: uint8, column 0 the class,
then 1024 pixels. On a GPU these compute in bfloat16, for the Hopper kernels (`--dtype`). The digits
stay as they are: 64 pixels are too few for the kernels' blocks of 32 or more.
"""

import argparse
import dataclasses
from pathlib import Path

from comparison import Size, compare
from sparsax import data

DIGITS = Size(
    block=4, quantile=0.9, layers=2, features=64, heads=2, batch_size=32, learning_rate=2e-3,
    probe_every=40, dense_steps=300, sparse_steps=200,
)  # fmt: skip
SMALL = Size(
    block=32, quantile=0.96, layers=2, features=64, heads=2, batch_size=8, learning_rate=1e-3,
    probe_every=100, dense_steps=300, sparse_steps=200, scored=500,
)  # fmt: skip
FULL = dataclasses.replace(
    SMALL, batch_size=128, learning_rate=1e-4, probe_every=500, dense_steps=2_000,
    sparse_steps=8_000, dropout=0.1, scored=10_000,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with cifar10_gray_{train,test}.npy.xz")
    parser.add_argument("--full", action="store_true", help="the Long Range Arena's sizes")
    Size.add_flags(parser)
    args = parser.parse_args()
    if args.full and args.data is None:
        parser.error("--full needs --data FOLDER: the digits are 64 pixels")

    if args.data is None:
        name, dataset, size = "digits", data.digits(), DIGITS
    else:
        name, dataset = "cifar10", data.read_cifar10_gray(args.data)
        size = (FULL if args.full else SMALL).for_kernels()
    folder = args.folder / f"{name}-{args.variant}-{args.pruned}-{args.seed}"
    size = size.changed_by(args)
    compare(name, dataset, size, folder, variant=args.variant, pruned=args.pruned, seed=args.seed)


if __name__ == "__main__":
    main()
