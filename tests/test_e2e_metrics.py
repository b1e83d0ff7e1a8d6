"""The scores of E2E sentences against examples worked out by hand, or in print."""

import math

import numpy as np
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
BOOK_REFERENCE = "he was interested in world history because he read the book"


def split(*texts):
    return [text.split() for text in texts]


def test_bleu_is_that_in_print():
    party = [PARTY.split()], [split(*PARTY_REFERENCES)]
    assert metrics.bleu(*party) == pytest.approx(0.5045666840058485, abs=1e-12)
    both = split(PARTY, BOOK), [split(*PARTY_REFERENCES), split(BOOK_REFERENCE)]
    assert metrics.bleu(*both) == pytest.approx(0.5920778868801042, abs=1e-12)


def test_bleu_counts_no_word_more_often_than_a_reference_and_punishes_short_sentences():
    # 1-grams 4 of 4, 2-grams 3 of 3, ...; 4 words where the closest reference has 5.
    assert metrics.bleu(split("a b c d"), [split("a b c d e", "a")]) == pytest.approx(
        math.exp(1 - 5 / 4)
    )
    assert metrics.bleu(split("a a a a"), [split("a b c d e", "a")]) == 0.0
    # 5 of 6, 4 of 5, 3 of 4, 2 of 3: the second "e" is one too many.
    want = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert metrics.bleu(split("a b c d e e"), [split("a b c d e f")]) == pytest.approx(want)


def test_nist_weighs_words_by_information():
    # Two references "a b" and "a c": log2(4 / 2) for a, log2(4 / 1) for b, log2(2 / 1) for "a b".
    got = metrics.nist(split("a b", "a c"), [split("a b"), split("a c")])
    assert got == pytest.approx((2 * 1 + 2 * 2) / 4 + (1 + 1) / 2)
    # Two words of three: half of what they would count.
    got = metrics.nist(split("a b"), [split("a b c")])
    assert got == pytest.approx(0.5 * 2 * math.log2(3) / 2)


def test_rouge_takes_the_best_precision_and_the_best_recall():
    assert metrics.longest_common(*split("a b c b d", "b d c a b d")) == 4
    got = metrics.rouge_l(split("police kill the gunman"), [split("police killed the gunman")])
    assert got == pytest.approx(0.75)
    # Precision 2 / 4 by the first reference, recall 1 / 1 by the second.
    got = metrics.rouge_l(split("a b c d"), [split("a b x y z", "d")])
    assert got == pytest.approx(2.44 * 0.5 / (1 + 1.44 * 0.5))


def test_cider_is_ten_for_the_only_reference_and_none_for_words_that_all_have():
    refs = [split("a b c d e"), split("f g h i j")]
    assert metrics.cider(split("a b c d e", "f g h i j"), refs) == pytest.approx(10)
    assert metrics.cider(split("f g h i j", "a b c d e"), refs) == 0
    everywhere = [split("x x x x")] * 2
    assert metrics.cider(split("x x x x", "x x x x"), everywhere) == 0


def test_cider_clips_counts_and_punishes_lengths():
    refs = [split("a b c d"), split("f g h i")]
    got = metrics.cider(split("a b c d d", "q"), refs)
    # d is twice in the sentence, at log 2 like every n-gram; one bigram too many.
    one = (1 + 1 + 1 + 1) / (math.sqrt(1 + 1 + 1 + 4) * 2)
    rest = [n / (math.sqrt(n) * math.sqrt(n + 1)) for n in (3, 2, 1)]
    want = 10 * np.mean([one, *rest]) * math.exp(-1 / 72) / 2
    assert got == pytest.approx(want)


def test_tokens():
    text = "Aromi's £20-25 menu, rated 3.5 (of 5), isn't family-friendly."
    assert metrics.mteval_tokens(text) == [
        "aromi's", "£20", "-", "25", "menu", ",", "rated", "3.5", "(", "of", "5", ")", ",",
        "isn't", "family-friendly", ".",
    ]  # fmt: skip
    assert metrics.words(text) == [
        "aromi", "'s", "£", "20-25", "menu", "rated", "3.5", "of", "5", "is", "n't",
        "family-friendly",
    ]  # fmt: skip


def test_real_references_score_well_against_each_other():
    refs = [split(f"the {x} is a place in the city", f"{x} is in the city centre") for x in "abc"]
    same = [found[0] for found in refs]
    mixed = [refs[(i + 1) % 3][0] for i in range(3)]
    for score in (metrics.bleu, metrics.nist, metrics.rouge_l, metrics.cider):
        assert score(same, refs) > score(mixed, refs)
