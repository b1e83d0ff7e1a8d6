"""Sentences from a language model: greedy and beam search in one compiled loop, with a cache."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax

NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How to search; a width of 1 without more is greedy.

    Attributes:
        width: beams W.
        steps: longest sentence, the end token counted.
        end: id of the end token.
        length_penalty: a sentence's log-probability is divided by `length ** length_penalty`.
        no_repeat: no sentence has a run of so many tokens twice; 0 allows it.
    """

    width: int = 1
    steps: int = 64
    end: int
    length_penalty: float = 1.0
    no_repeat: int = 0


class Beams(typing.NamedTuple):
    """Where a search stands.

    Attributes:
        step: tokens of a sentence so far.
        tokens: sentences that go on, `[B, W, steps]`.
        scores: their log-probabilities `[B, W]`; NEVER where there is none.
        last: logits of what comes next `[B, W, C]`.
        cache: of the model, `[B * W, ...]`.
        best: the best sentence that has ended `[B, steps]`.
        best_score: its normalised log-probability `[B]`; NEVER where there is none.
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    last: jax.Array
    cache: typing.Any
    best: jax.Array
    best_score: jax.Array


def search(model, prompts: jax.Array, counts: jax.Array, how: Search) -> jax.Array:
    """The best sentence for every prompt, `[B, steps]`, `end` from its end on.

    Of the 2 W best continuations of all beams those that end are candidates for the result and the
    W best of the others go on, until none can become better than what has ended: the search of
    Wu et al. (arXiv 1609.08144), section 7, without a coverage penalty.

    Args:
        model: a `sparsax.nn.LanguageModel`.
        prompts: ids `[B, P]`, padded at the end.
        counts: ids of each prompt, at least 1.
        how: the search.
    """
    state = _begin(model, prompts, counts, how)
    state = lax.while_loop(
        functools.partial(_goes_on, how), functools.partial(_step, model, counts, how), state
    )
    unfinished = (state.best_score <= NEVER)[:, None]
    first = jnp.argmax(state.scores, -1)[:, None, None]
    going = jnp.take_along_axis(state.tokens, first, 1)[:, 0]
    return jnp.where(unfinished, going, state.best)


def _begin(model, prompts, counts, how: Search) -> Beams:
    batch, width = prompts.shape[0], how.width
    cache = model.empty_cache(batch, prompts.shape[1] + how.steps)
    logits, cache = model.decode(prompts, cache, jnp.zeros(batch, jnp.int32))
    last = jnp.take_along_axis(logits, counts[:, None, None] - 1, 1).astype(jnp.float32)
    none = jnp.full((batch, how.steps), how.end, jnp.int32)
    return Beams(
        step=jnp.int32(0),
        tokens=jnp.repeat(none[:, None], width, 1),
        scores=jnp.where(jnp.arange(width) == 0, 0.0, jnp.full((batch, 1), NEVER)),
        last=jnp.repeat(last, width, 1),
        cache=jax.tree.map(lambda x: jnp.repeat(x, width, 0), cache),
        best=none,
        best_score=jnp.full(batch, NEVER),
    )


def _goes_on(how: Search, state: Beams) -> jax.Array:
    # A log-probability only falls, and dividing by the largest length flatters it most.
    hope = state.scores.max(-1) / how.steps**how.length_penalty
    return (state.step < how.steps) & (hope > state.best_score).any()


def _step(model, counts, how: Search, state: Beams) -> Beams:
    batch, width, classes = state.last.shape
    log_p = jax.nn.log_softmax(state.last, -1)
    log_p = jnp.where(_repeats(state, how), NEVER, log_p)
    total = (state.scores[..., None] + log_p).reshape(batch, -1)
    scores, index = lax.top_k(total, min(2 * width, total.shape[1]))
    parent, token = index // classes, index % classes
    tokens = jnp.take_along_axis(state.tokens, parent[..., None], 1)
    tokens = jnp.where(jnp.arange(how.steps) == state.step, token[..., None], tokens)

    # The best that ends now, among the W best, against the best so far.
    ends = (token == how.end) & (scores > NEVER)
    ended = jnp.where(ends, scores, NEVER)[:, :width]
    ended = jnp.where(ended > NEVER, ended / (state.step + 1.0) ** how.length_penalty, NEVER)
    first = ended.argmax(-1)
    better = ended.max(-1) > state.best_score
    best = jnp.take_along_axis(tokens, first[:, None, None], 1)[:, 0]

    going, rank = lax.top_k(jnp.where(token == how.end, NEVER, scores), width)
    parent, token = (jnp.take_along_axis(x, rank, 1) for x in (parent, token))
    rows = (jnp.arange(batch)[:, None] * width + parent).reshape(-1)
    cache = jax.tree.map(lambda x: x[rows], state.cache)
    start = jnp.repeat(counts, width) + state.step
    logits, cache = model.decode(token.reshape(-1, 1), cache, start)
    return Beams(
        step=state.step + 1,
        tokens=jnp.take_along_axis(tokens, rank[..., None], 1),
        scores=jnp.maximum(going, NEVER),
        last=logits.astype(jnp.float32).reshape(batch, width, classes),
        cache=cache,
        best=jnp.where(better[:, None], best, state.best),
        best_score=jnp.maximum(ended.max(-1), state.best_score),
    )


def _repeats(state: Beams, how: Search) -> jax.Array:
    """True for tokens that would close a run of `no_repeat` that the sentence has, `[B, W, C]`."""
    shape, n = state.last.shape, how.no_repeat
    if not n or how.steps < n:
        return jnp.zeros(shape, bool)
    runs = jnp.stack([state.tokens[..., i : how.steps - n + 1 + i] for i in range(n)], -1)
    tail = lax.dynamic_slice_in_dim(state.tokens, state.step - n + 1, n - 1, axis=2)
    places = jnp.arange(runs.shape[2]) + n  # tokens up to the end of each run
    same = (runs[..., :-1] == tail[:, :, None]).all(-1) & (places <= state.step)
    b, w = jnp.indices(shape[:2], sparse=True)
    return jnp.zeros(shape, bool).at[b[..., None], w[..., None], runs[..., -1]].max(same)
