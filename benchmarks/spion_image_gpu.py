"""SPION on images as sequences of gray pixels (CIFAR-10, the Long Range Arena's image task).

    python benchmarks/spion_image_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_image_gpu.py --data FOLDER --out FOLDER --quick

FOLDER holds cifar10_gray_{train,test}.npy.xz: uint8, column 0 the class, then 1024 pixels. The
train file may be a part of the whole. Without --data --quick takes scikit-learn's digits.
"""

import dataclasses

from spion_classify import METHODS, classification
from spion_compare import compare
from spion_task import Size, parse

from sparsax import data

FULL = Size(
    length=1024, block=32, layers=2, features=64, heads=2, batch_size=128, learning_rate=1e-3,
    dropout=0.1, probe_every=500, dense_steps=3_000, steps=2_000, density=0.15, quantile=0.96,
    paper_density=0.04, held_batches=39,
)  # fmt: skip
QUICK = dataclasses.replace(
    FULL, length=64, block=8, batch_size=32, probe_every=20, dense_steps=60, steps=40,
    steps_per_call=20, density=0.5, quantile=0.8, paper_density=0.3, held_batches=4,
)  # fmt: skip


def main() -> None:
    args = parse(__doc__)
    if args.data is None and not args.quick:
        raise SystemExit("--data FOLDER is needed, or --quick")
    size = (QUICK if args.quick else FULL).changed_by(args)
    dataset = data.digits() if args.data is None else data.read_cifar10_gray(args.data)
    compare(classification("image", dataset, size), args, METHODS)


if __name__ == "__main__":
    main()
