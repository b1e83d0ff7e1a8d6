"""SPION on ListOps of the Long Range Arena, generated at the first call (seconds on many cores).

    python benchmarks/spion_listops_gpu.py --out FOLDER
    python benchmarks/spion_listops_gpu.py --out FOLDER --quick

The samples are kept in --data FOLDER, or in the folder sparsax of the machine's temporary files.
"""

import argparse
import tempfile
from pathlib import Path

from spion_classify import run
from spion_task import Size

from sparsax import data

FULL = Size(
    length=2048, block=64, layers=4, features=64, heads=2, batch_size=64, learning_rate=7e-4,
    dropout=0.1, probe_every=500, dense_steps=3_000, steps=1_500, density=0.2, quantile=0.98,
    paper_density=0.04, held_batches=31,
)  # fmt: skip
QUICK = FULL.quick(length=128, block=16, layers=2, batch_size=16)
QUICK_DATA = data.ListOpsConfig(
    min_length=50, max_length=128, num_train=2_000, num_valid=200, num_test=200
)


def read(args: argparse.Namespace, size: Size) -> data.Dataset:
    config = QUICK_DATA if args.quick else data.ListOpsConfig()
    folder = args.data or Path(tempfile.gettempdir()) / "sparsax"  # --out is what is copied
    return data.load_listops(config, folder, progress=not args.no_bar).padded(size.length)


if __name__ == "__main__":
    run("listops", __doc__, FULL, QUICK, read)
