"""The kernel that chooses the L best keys finds the very integers of the portable choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas
from sparsax.patterns import topl
from sparsax.quantise.codes import ready_keys, tile_scores
from tests.top_l_cases import CASES, Case

MATCH = {c.name: c for c in CASES if c.score == "match"}
# Reading keys one by one makes interpret mode slow: few heads, few tiles.
INTERPRETED = (
    *(MATCH[name] for name in ("mqa", "two_words", "odd_codes", "one_key", "padding")),
    Case(name="all_keys", T=72, N=1, K=1, keep=72, padding="some"),
    Case(name="all_seen_of_one_tile", B=1, T=150, N=1, K=1, keep=128),
    Case(name="holes", T=150, N=1, K=1, keep=20, padding="holes"),
    Case(name="bidirectional", B=2, T=200, N=1, K=1, keep=21, causal=False, padding="all"),
    Case(name="few_scores", B=1, T=256, N=1, K=1, H=8, keep=100),
    Case(name="one_key_bidirectional", B=1, T=72, N=2, K=1, H=128, keep=1, causal=False),
)
LARGE = (
    Case(name="long", B=2, T=5000, N=4, K=2, H=64, keep=625),
    Case(name="long_bidirectional", T=3001, N=2, K=1, H=128, keep=375, causal=False,
         padding="some"),
    Case(name="long_padding", T=2048, N=4, K=1, H=96, keep=40, padding="all"),
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=2)
def by_kernel(codes, key_mask, options):
    return pallas.top_l.select(codes, key_mask, interpret=pallas.interpret(), **dict(options))


def check(c):
    *_, codes, key_mask = c.inputs()
    by_kernel.clear_cache()  # a trace keeps whether it was to be interpreted
    got = by_kernel(codes, key_mask, (("keep", c.keep), ("causal", c.causal)))
    choose = jax.jit(topl.tokens, static_argnames=("keep", "causal"))
    kept = choose(codes, keep=c.keep, causal=c.causal, key_mask=key_mask)
    for name, x, want in zip(("tau", "first"), got, (kept.tau, kept.first), strict=True):
        assert x.dtype == want.dtype
        np.testing.assert_array_equal(x, want, err_msg=name)
    return kept


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("c", INTERPRETED, ids=lambda c: c.name)
def test_interpreted_kernel_finds_the_integers_of_the_portable_choice(c):
    with pallas.interpreted(detect_races=True):
        check(c)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [*MATCH.values(), *INTERPRETED, *LARGE], ids=lambda c: c.name)
def test_kernel_finds_the_integers_of_the_portable_choice(c):
    check(c)


def test_the_cases_meet_ties_and_rows_that_see_too_few():
    for c in (MATCH["mqa"], MATCH["padding"]):
        *_, codes, key_mask = c.inputs()
        kept = topl.tokens(codes, keep=c.keep, causal=c.causal, key_mask=key_mask)
        ready = ready_keys(codes.queries, codes.keys, codes.num_codes)
        scores = tile_scores(
            codes.queries, ready, jnp.arange(c.T), key_mask, num_codes=codes.num_codes,
            causal=c.causal,
        )  # fmt: skip
        scores = scores.reshape(c.B, c.N, c.T, c.T)
        tau, first = (x.swapaxes(1, 2)[..., None] for x in (kept.tau, kept.first))
        assert ((scores == tau) & (jnp.arange(c.T) < first)).any()  # a tie that is not kept
        assert ((scores >= 0).sum(-1) < c.keep).any()
