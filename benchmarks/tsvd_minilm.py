"""A real sentence encoder at 2x, 4x, 8x: tiles against plain SVD, with and without calibration.

    uv run python benchmarks/tsvd_minilm.py --imdb FOLDER --plot docs/tsvd_minilm.png

all-MiniLM-L6-v2 (6 layers of 384), all 36 dense layers of its blocks compressed; embeddings of
real sentences (IMDB) against those of the dense model. Calibration sentences come from the
training reviews, the others from the test reviews.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from harness import save

import sparsax
from sparsax.nn import Bert
from sparsax.rules import TSVD

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from compress import MODEL, agreement, batches, embed, read_sentences

METHODS = {
    "plain SVD": {"tile": None},
    "tiles of 64": {"tile": 64},
    "tiles of 128": {"tile": 128},
    "one budget": {"tile": "auto"},
}


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("cosine", "top_10"), strict=True):
        for color, method in enumerate(METHODS):
            for weighted in (True, False):
                mine = [r for r in rows if (r["method"], r["weighted"]) == (method, weighted)]
                axis.plot(
                    [r["ratio"] for r in mine], [r[metric] for r in mine], f"C{color}o",
                    ls="-" if weighted else ":",
                    label=method + (", calibrated" if weighted else ""),
                )  # fmt: skip
        axis.set(xscale="log", xlabel="compression of the dense layers", ylim=(0, 1))
        axis.set_xticks([2, 4, 8], ["2x", "4x", "8x"], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("cosine to the dense embedding")
    axes[1].set_ylabel("share of the 10 nearest that are found")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imdb", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    model = Bert.from_folder(MODEL)
    count = args.sentences
    data = batches(read_sentences(args.imdb / "imdb_test.jsonl.xz", count))
    calibration = batches(read_sentences(args.imdb / "imdb_train.jsonl.xz", args.calibration))
    dense = embed(model, data, count)
    rows = []
    print("ratio method        calibrated  error  cosine   5 %  top 1 top 10")
    for ratio in args.ratios:
        for method, options in METHODS.items():
            for weighted in (False, True):
                rule = TSVD(path=r"layers.*", ratio=ratio, weighted=weighted, **options)
                small, report = sparsax.sparsify(
                    model, [rule], calibrate=lambda m: embed(m, calibration, count)
                )
                before, after = report.total("parameters")
                row = {
                    "ratio": ratio, "reached": before / after, "method": method,
                    "weighted": weighted,
                    "error": float(np.sqrt(np.mean([r.error**2 for r in report.rows]))),
                    **agreement(embed(small, data, count), dense),
                    "layers": {r.path: [r.detail, round(r.error, 4)] for r in report.rows},
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{ratio:5.0f} {method:13} {weighted!s:10} {row['error']:6.3f} "
                    f"{row['cosine']:7.3f} {row['cosine_5_percent']:5.2f} {row['top_1']:6.2f} "
                    f"{row['top_10']:6.2f}",
                    flush=True,
                )
    # The record names the command, not the folder of the machine it ran on.
    sys.argv[1:] = [word.replace(str(args.imdb), "FOLDER") for word in sys.argv[1:]]
    print(save("tsvd_minilm", rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
