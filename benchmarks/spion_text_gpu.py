"""SPION on bytes of film reviews (IMDB, the Long Range Arena's text task): liked or not?

    python benchmarks/spion_text_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_text_gpu.py --data FOLDER --out FOLDER --quick

FOLDER holds imdb_{train,test}.jsonl.xz.
"""

import argparse

from spion_classify import run
from spion_task import Size, data_folder

from sparsax import data

FULL = Size(
    length=4096, block=64, layers=2, features=64, heads=2, batch_size=32, learning_rate=3e-4,
    dropout=0.1, probe_every=200, dense_steps=3_000, steps=1_500, density=0.1, quantile=0.99,
    paper_density=0.03, held_batches=62,
)  # fmt: skip
QUICK = FULL.quick(length=256, block=32, batch_size=8)


def read(args: argparse.Namespace, size: Size) -> data.Dataset:
    return data.read_imdb(data_folder(args), max_length=size.length)


if __name__ == "__main__":
    run("text", __doc__, FULL, QUICK, read)
