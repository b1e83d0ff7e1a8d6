"""SPION on bytes of film reviews (IMDB, the Long Range Arena's text task): liked or not?

    python benchmarks/spion_text_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_text_gpu.py --data FOLDER --out FOLDER --quick

FOLDER holds imdb_{train,test}.jsonl.xz.
"""

import dataclasses

from spion_classify import METHODS, classification
from spion_compare import compare
from spion_task import Size, parse

from sparsax import data

FULL = Size(
    length=4096, block=64, layers=2, features=64, heads=2, batch_size=32, learning_rate=3e-4,
    dropout=0.1, probe_every=200, dense_steps=3_000, steps=1_500, density=0.1, quantile=0.99,
    paper_density=0.03, held_batches=62,
)  # fmt: skip
QUICK = dataclasses.replace(
    FULL, length=256, block=32, batch_size=8, probe_every=20, dense_steps=60, steps=40,
    steps_per_call=20, density=0.5, quantile=0.8, paper_density=0.3, held_batches=4,
)  # fmt: skip


def main() -> None:
    args = parse(__doc__)
    if args.data is None:
        raise SystemExit("--data FOLDER is needed")
    size = (QUICK if args.quick else FULL).changed_by(args)
    dataset = data.read_imdb(args.data, max_length=size.length)
    compare(classification("text", dataset, size), args, METHODS)


if __name__ == "__main__":
    main()
