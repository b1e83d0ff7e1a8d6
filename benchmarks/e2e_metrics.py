"""Scores of generated E2E sentences, by the protocol of the E2E challenge (e2e-metrics).

    uv run --group metrics python benchmarks/e2e_metrics.py --data FOLDER   # of finetune_e2e_gpu.py

BLEU is sacrebleu's, with mteval-v13a's tokens in lower case; METEOR, ROUGE-L and CIDEr are
pycocoevalcap's, which runs METEOR's and Stanford's tokenizer's programs: it needs Java. NIST is
counted here over BLEU's tokens: mteval-v13a, which the protocol asks for, counts n-grams against
all references together, NLTK against the best one. A file has a line for every meaning of the test
set, in order; its name is WAY_SEED_BATCH_RATE_EPOCHS_SEARCH.txt.
"""

import argparse
import collections
import importlib.metadata
import itertools
import math
import time
from pathlib import Path

import numpy as np
from harness import RESULTS
from resumed import Rows

from sparsax.data import read_e2e

KEYS = ("way", "seed", "batch", "rate", "epochs", "search")  # what makes a row another one
Tokens = list[str]


def bleu(sentences: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of the whole corpus, as a share."""
    import sacrebleu

    # One stream for the first reference of each sentence, one for the second, and so on.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    found = sacrebleu.corpus_bleu(sentences, streams, lowercase=True, tokenize="13a")
    return found.score / 100


def mteval_tokens(text: str) -> Tokens:
    """Words and punctuation as mteval-v13a splits them, in lower case."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower()).split()


def ngrams(tokens: Tokens, n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def clipped(tokens: Tokens, references: list[Tokens], n: int) -> collections.Counter:
    """The n-grams of a sentence, each no more often than in the reference that has it most."""
    most: collections.Counter = collections.Counter()
    for reference in references:
        most |= ngrams(reference, n)
    return ngrams(tokens, n) & most


def nist(sentences: list[Tokens], references: list[list[Tokens]]) -> float:
    """NIST-5 of the whole corpus. Doddington, HLT 2002."""
    every = [reference for refs in references for reference in refs]
    counts = {0: {(): sum(map(len, every))}}
    for n in range(1, 6):
        counts[n] = collections.Counter(
            gram for reference in every for gram in ngrams(reference, n).elements()
        )
    score = 0.0
    for n in range(1, 6):
        gained = sum(
            hits * math.log2(counts[n - 1][gram[:-1]] / counts[n][gram])
            for s, refs in zip(sentences, references, strict=True)
            for gram, hits in clipped(s, refs, n).items()
        )
        score += gained / max(1, sum(len(s) - n + 1 for s in sentences))
    wanted = sum(np.mean([len(reference) for reference in refs]) for refs in references)
    ratio = min(1.0, sum(map(len, sentences)) / wanted)
    beta = math.log(0.5) / math.log(1.5) ** 2  # a half where a sentence is two thirds as long
    return score * math.exp(beta * math.log(ratio) ** 2) if ratio else 0.0


def caption_scores(sentences: list[str], references: list[list[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = lambda texts: [{"caption": text} for text in texts]
    wanted = {i: captions(texts) for i, texts in enumerate(references)}
    given = {i: captions([text]) for i, text in enumerate(sentences)}
    wanted, given = PTBTokenizer().tokenize(wanted), PTBTokenizer().tokenize(given)
    scorers = {"METEOR": Meteor(), "ROUGE_L": Rouge(), "CIDEr": Cider()}
    return {name: float(x.compute_score(wanted, given)[0]) for name, x in scorers.items()}


def scores(sentences: list[str], references: list[list[str]]) -> dict[str, float]:
    """All five."""
    tokens = [[mteval_tokens(text) for text in texts] for texts in references]
    return {
        "BLEU": bleu(sentences, references),
        "NIST": nist([mteval_tokens(text) for text in sentences], tokens),
        **caption_scores(sentences, references),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the E2E files")
    parser.add_argument("--generations", type=Path, default=RESULTS / "finetune_e2e")
    parser.add_argument("--name", default="e2e_metrics", help="of the result: one for each study")
    args = parser.parse_args()
    test, done = read_e2e(args.data).test, Rows(args.name, KEYS, resume=False)
    used = {name: importlib.metadata.version(name) for name in ("sacrebleu", "pycocoevalcap")}
    for path in sorted(args.generations.glob("*.txt")):
        begin, lines = time.perf_counter(), path.read_text().split("\n")[:-1]
        if len(lines) != len(test):
            print(f"{path.name} has {len(lines)} lines, for {len(test)} meanings: the first ones")
        references = [list(m.references) for m in test[: len(lines)]]
        way, seed, batch, rate, epochs, kind = path.stem.split("_")
        row = {"way": way, "seed": int(seed), "batch": int(batch), "rate": float(rate),
               "epochs": int(epochs), "search": kind, "meanings": len(lines),
               **scores(lines, references), "versions": used}  # fmt: skip
        done.add(begin, row)
        names = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
        print(f"{path.stem:36s}", *(f"{name} {row[name]:.4f}" for name in names))


if __name__ == "__main__":
    main()
