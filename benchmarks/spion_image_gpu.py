"""SPION on images as sequences of gray pixels (CIFAR-10, the Long Range Arena's image task).

    python benchmarks/spion_image_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_image_gpu.py --data FOLDER --out FOLDER --quick

FOLDER holds cifar10_gray_{train,test}.npy.xz: uint8, column 0 the class, then 1024 pixels. The
train file may be a part of the whole. Without --data --quick takes scikit-learn's digits.
"""

import argparse

from spion_classify import run
from spion_task import Size, data_folder

from sparsax import data

FULL = Size(
    length=1024, block=32, layers=2, features=64, heads=2, batch_size=128, learning_rate=1e-3,
    dropout=0.1, probe_every=500, dense_steps=3_000, steps=2_000, density=0.2, quantile=0.96,
    paper_density=0.04, held_batches=39,
)  # fmt: skip
QUICK = FULL.quick(length=64, block=8, batch_size=32)


def read(args: argparse.Namespace, _: Size) -> data.Dataset:
    if args.quick and args.data is None:
        return data.digits()
    return data.read_cifar10_gray(data_folder(args))


if __name__ == "__main__":
    run("image", __doc__, FULL, QUICK, read)
