"""Scores of generated E2E sentences, by the protocol of the E2E challenge (e2e-metrics).

    uv run python benchmarks/e2e_metrics.py --data FOLDER                   # of finetune_e2e_gpu.py
    uv run --group metrics python benchmarks/e2e_metrics.py --data FOLDER   # METEOR too, with Java

BLEU and NIST as mteval-v13a: its tokens in lower case, clipped counts over all references, the
closest reference's length (BLEU) or the mean one (NIST, which weighs n-grams by information).
ROUGE-L and CIDEr (its variant D) as coco-caption, over words without punctuation: by a few rules
here, where coco-caption asks Stanford's Penn Treebank tokenizer. METEOR is the program that
pycocoevalcap brings, and is left out where the package is not installed; `--check` then also
prints that package's own ROUGE-L and CIDEr. A file has a line for every meaning of the test set, in
order; its name is WAY_SEED_BATCH_RATE_EPOCHS_SEARCH.txt.
"""

import argparse
import collections
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np

from sparsax.data import read_e2e

HERE = Path(__file__).parent
Tokens = list[str]
SIGMA = 6.0  # of CIDEr-D's penalty on lengths


def mteval_tokens(text: str) -> Tokens:
    """Words and punctuation as mteval-v13a splits them, in lower case."""
    for entity, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text.lower()} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # but not within a number
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def words(text: str) -> Tokens:
    """Words in lower case, contractions split, without punctuation: near the Penn Treebank's."""
    text = re.sub(r"(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", text.lower().replace("’", "'"))
    text = re.sub(r"([£$€])(?=\d)", r"\1 ", text)
    return [word for x in re.split(r"[\s,;:!?()\"]+", text) if (word := x.strip(".`-").rstrip("'"))]


def ngrams(tokens: Tokens, n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def clipped(tokens: Tokens, references: list[Tokens], n: int) -> collections.Counter:
    """The n-grams of a sentence, each no more often than in the reference that has it most."""
    most: collections.Counter = collections.Counter()
    for reference in references:
        most |= ngrams(reference, n)
    return ngrams(tokens, n) & most


def bleu(sentences: list[Tokens], references: list[list[Tokens]]) -> float:
    """BLEU-4 of the whole corpus. Papineni et al., ACL 2002."""
    pairs = list(zip(sentences, references, strict=True))
    closest = lambda s, refs: min((abs(len(r) - len(s)), len(r)) for r in refs)[1]
    length, wanted = sum(map(len, sentences)), sum(closest(*pair) for pair in pairs)
    logs = []
    for n in range(1, 5):
        hits = sum(clipped(s, refs, n).total() for s, refs in pairs)
        count = sum(max(len(s) - n + 1, 0) for s in sentences)
        if not hits:
            return 0.0
        logs.append(math.log(hits / count))
    return min(1.0, math.exp(1 - wanted / length)) * math.exp(np.mean(logs))


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


def longest_common(one: Tokens, other: Tokens) -> int:
    """Words of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        left = row[:]
        for j, its in enumerate(other):
            row[j + 1] = left[j] + 1 if word == its else max(left[j + 1], row[j])
    return row[-1]


def rouge_l(sentences: list[Tokens], references: list[list[Tokens]], beta: float = 1.2) -> float:
    """Mean over the meanings of the F of the best recall and the best precision. Lin, 2004."""
    scores = []
    for s, refs in zip(sentences, references, strict=True):
        common = [longest_common(s, reference) for reference in refs]
        precision = max(common) / max(len(s), 1)
        recall = max(c / max(len(r), 1) for c, r in zip(common, refs, strict=True))
        both = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / both if both else 0.0)
    return float(np.mean(scores))


def cider(sentences: list[Tokens], references: list[list[Tokens]]) -> float:
    """CIDEr-D. Vedantam, Zitnick, Parikh, CVPR 2015, with coco-caption's lengths in bigrams."""
    meanings = len(references)
    seen = [collections.Counter(gram for refs in references
                                for gram in set().union(*(ngrams(r, n) for r in refs)))
            for n in range(1, 5)]  # fmt: skip
    rarity = lambda gram: math.log(meanings / max(1, seen[len(gram) - 1][gram]))

    def similar(s: Tokens, reference: Tokens, n: int) -> float:
        a, b = ({gram: count * rarity(gram) for gram, count in ngrams(x, n).items()}
                for x in (s, reference))  # fmt: skip
        sizes = [math.sqrt(sum(value**2 for value in x.values())) for x in (a, b)]
        product = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
        return product / math.prod(sizes) if all(sizes) else 0.0

    def score(s: Tokens, reference: Tokens) -> float:
        apart = max(len(s) - 1, 0) - max(len(reference) - 1, 0)
        penalty = math.exp(-(apart**2) / (2 * SIGMA**2))
        return penalty * float(np.mean([similar(s, reference, n) for n in range(1, 5)]))

    pairs = zip(sentences, references, strict=True)
    return 10 * float(np.mean([np.mean([score(s, r) for r in refs]) for s, refs in pairs]))


def of_package(sentences: list[str], references: list[list[str]]) -> dict[str, float]:
    """METEOR, and ROUGE-L and CIDEr to check ours by, from pycocoevalcap with its tokenizer."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    asked = {i: [{"caption": text} for text in refs] for i, refs in enumerate(references)}
    given = {i: [{"caption": text}] for i, text in enumerate(sentences)}
    asked, given = PTBTokenizer().tokenize(asked), PTBTokenizer().tokenize(given)
    scorers = {"METEOR": Meteor(), "ROUGE_L": Rouge(), "CIDEr": Cider()}
    return {name: float(x.compute_score(asked, given)[0]) for name, x in scorers.items()}


def scores(sentences: list[str], references: list[list[str]]) -> dict[str, float]:
    """Our four scores."""
    split = lambda tokens: ([tokens(s) for s in sentences],
                            [[tokens(r) for r in refs] for refs in references])  # fmt: skip
    mteval, plain = split(mteval_tokens), split(words)
    return {"BLEU": bleu(*mteval), "NIST": nist(*mteval), "ROUGE_L": rouge_l(*plain),
            "CIDEr": cider(*plain)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the E2E files")
    parser.add_argument("--generations", type=Path, default=HERE / "results" / "finetune_e2e")
    parser.add_argument("--check", action="store_true", help="also the package's ROUGE-L, CIDEr")
    args = parser.parse_args()
    package = importlib.util.find_spec("pycocoevalcap") is not None
    if not package:
        print("pycocoevalcap is not installed: no METEOR (uv run --group metrics ...)")
    test, rows = read_e2e(args.data).test, []
    for path in sorted(args.generations.glob("*.txt")):
        lines = path.read_text().split("\n")[:-1]
        if len(lines) != len(test):
            print(f"{path.name} has {len(lines)} lines, for {len(test)} meanings: the first ones")
        references = [list(m.references) for m in test[: len(lines)]]
        way, seed, batch, rate, epochs, kind = path.stem.split("_")
        row = {"way": way, "seed": int(seed), "batch": int(batch), "rate": float(rate),
               "epochs": int(epochs), "search": kind, "meanings": len(lines),
               **scores(lines, references)}  # fmt: skip
        if package:
            theirs = of_package(lines, references)
            row["METEOR"] = theirs["METEOR"]
            if args.check:
                print({name: round(value, 4) for name, value in theirs.items()})
        rows.append(row)
        names = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
        print(f"{path.stem:36s}", *(f"{name} {row[name]:.4f}" for name in names if name in row))
    out = HERE / "results" / "e2e_metrics.json"
    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
