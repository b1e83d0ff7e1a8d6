"""The scores of E2E sentences against examples worked out by hand, or in print."""

import math
import shutil

import pytest

from benchmarks import e2e_metrics as metrics

# The example of Papineni et al. (2002), as in the documentation of nltk.translate.bleu_score.
PARTY = (
    "It is a guide to action which ensures that the military always obeys the commands of the party"
)
PARTY_REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
BOOK = "he read the book because he was interested in world history"
NAMES = "Wrestlers", "Eagle", "Mill"
BOOK_REFERENCE = "he was interested in world history because he read the book"


def split(*texts):
    return [text.split() for text in texts]


def test_bleu_is_that_in_print():
    assert metrics.bleu([PARTY], [PARTY_REFERENCES]) == pytest.approx(0.5045666840058485, abs=1e-9)
    both = [PARTY, BOOK], [PARTY_REFERENCES, [BOOK_REFERENCE]]
    assert metrics.bleu(*both) == pytest.approx(0.5920778868801042, abs=1e-9)


def test_nist_weighs_words_by_information():
    # Two references "a b" and "a c": log2(4 / 2) for a, log2(4 / 1) for b, log2(2 / 1) for "a b".
    got = metrics.nist(split("a b", "a c"), [split("a b"), split("a c")])
    assert got == pytest.approx((2 * 1 + 2 * 2) / 4 + (1 + 1) / 2)
    # Two words of three: half of what they would count.
    got = metrics.nist(split("a b"), [split("a b c")])
    assert got == pytest.approx(0.5 * 2 * math.log2(3) / 2)


def test_tokens_are_those_of_mteval():
    text = "Aromi's £20-25 menu, rated 3.5 (of 5), isn't family-friendly."
    assert metrics.mteval_tokens(text) == [
        "aromi's", "£20", "-", "25", "menu", ",", "rated", "3.5", "(", "of", "5", ")", ",",
        "isn't", "family-friendly", ".",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # METEOR's pipes
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and its tokenizer need Java")
def test_a_reference_scores_best_and_another_meaning_worst():
    refs = [[f"The {x} is a place in the city.", f"{x} is in the city centre."] for x in NAMES]
    same = metrics.scores([found[0] for found in refs], refs)
    others = metrics.scores([refs[(i + 1) % 3][0] for i in range(3)], refs)
    assert set(same) == {"BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"}
    assert (same["BLEU"], same["ROUGE_L"]) == pytest.approx((1, 1))
    assert all(same[name] > others[name] for name in same)
