"""Greedy and beam search against plain Python over whole sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.generation import Search, search
from sparsax.nn import DecoderConfig, LanguageModel

END, STEPS = 1, 5
COUNTS = jnp.array([4, 2, 3])
PROMPTS = jnp.array([[2, 3, 0, 2], [3, 3, 0, 0], [2, 2, 3, 0]])


def model_of(classes, style="opt"):
    config = getattr(DecoderConfig, style)(
        vocab_size=classes, length=16, features=16, hidden=32, num_heads=2, layers=1
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    sharper = lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf
    nnx.update(model, jax.tree.map(sharper, nnx.state(model, nnx.Param)))
    return model


def log_p_of(model):
    """`f(ids)`: log-probabilities of what follows, by the model on the whole sequence."""
    run = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens), -1))
    known = {}

    def log_p(ids):
        if ids not in known:
            padded = jnp.zeros((1, 12), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
            known[ids] = np.asarray(run(model, padded)[0, len(ids) - 1])
        return known[ids]

    return log_p


def repeats(ids, n):
    runs = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    return n > 0 and len(set(runs)) < len(runs)


def plain_beam(log_p, prompt, how):
    """The same search with lists."""
    beams, best = [(0.0, ())], (-np.inf, None)
    for length in range(1, how.steps + 1):
        found = [
            (score + p, (*ids, token))
            for score, ids in beams
            for token, p in enumerate(log_p((*prompt, *ids)))
            if not repeats((*ids, token), how.no_repeat)
        ]
        found = sorted(found, reverse=True)[: 2 * how.width]
        ended = [(s / length**how.length_penalty, i) for s, i in found[: how.width] if i[-1] == END]
        best = max([best, *ended])
        beams = [(s, i) for s, i in found if i[-1] != END][: how.width]
    return best[1] if best[1] is not None else beams[0][1]


def run(model, how):
    return np.asarray(jax.jit(search, static_argnums=3)(model, PROMPTS, COUNTS, how))


def sentence(row):
    row = row.tolist()
    return tuple(row[: row.index(END) + 1] if END in row else row)


def prompts():
    return [tuple(p[:n].tolist()) for p, n in zip(PROMPTS, COUNTS, strict=True)]


@pytest.mark.parametrize("style", ["opt", "llama"])
@pytest.mark.parametrize("how", [
    Search(end=END, steps=STEPS), Search(end=END, steps=8, width=3, length_penalty=0.9),
    Search(end=END, steps=8, width=4, length_penalty=0.0, no_repeat=2),
], ids=["greedy", "beam", "no_repeat"])  # fmt: skip
def test_search_is_that_of_plain_lists(how, style):
    model = model_of(6, style)
    log_p = log_p_of(model)
    for row, prompt in zip(run(model, how), prompts(), strict=True):
        got = sentence(row)
        assert got == plain_beam(log_p, prompt, how)
        assert not repeats(got, how.no_repeat)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_enough_beam_finds_the_best_of_all_sentences(length_penalty):
    model, how = model_of(4), Search(end=END, steps=3, width=64, length_penalty=length_penalty)
    log_p = log_p_of(model)

    def score(prompt, ids):
        each = [log_p((*prompt, *ids[:i]))[token] for i, token in enumerate(ids)]
        return sum(each) / len(ids) ** length_penalty

    words = [0, 2, 3]
    for row, prompt in zip(run(model, how), prompts(), strict=True):
        every = [(*ids, END) for n in range(3) for ids in itertools.product(words, repeat=n)]
        assert sentence(row) == max(every, key=lambda ids: score(prompt, ids))


def test_a_sentence_that_does_not_end_is_cut():
    model = model_of(6)
    never = lambda leaf: leaf.at[END].set(0.0)  # its logit is 0, far below the others
    model.tokens.embedding[...] = never(model.tokens.embedding[...])
    rows = run(model, Search(end=END, steps=4))
    log_p = log_p_of(model)
    for row, prompt in zip(rows, prompts(), strict=True):
        assert sentence(row) == plain_beam(log_p, prompt, Search(end=END, steps=4))
