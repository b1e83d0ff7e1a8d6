import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax import choose_tiles, tsvd
from sparsax.lowrank.budget import measure

NOISE = jax.random.normal(jax.random.key(0), (64, 96))
SMOOTH = NOISE[:, :6] @ NOISE[:6] + 0.01 * NOISE


def blocks():
    """Rank 2 in every tile of 16, and of full rank as a whole."""
    u, v = jax.random.normal(jax.random.key(1), (2, 4, 6, 16, 2))
    return jnp.einsum("ijar,ijcr->iajc", u, v).reshape(64, 96)


WEIGHTS = {"noise": NOISE, "smooth": SMOOTH, "blocks": blocks()}
TILES = (16, 32, None)


def grams():
    mix = np.diag(np.arange(1.0, 65) ** -0.5)
    return {name: jnp.asarray(mix @ mix, jnp.float32) for name in WEIGHTS}


@pytest.mark.parametrize("ratio", [1.5, 2, 4, 6])
def test_the_budget_is_kept_and_nearly_spent(ratio):
    choices = choose_tiles(WEIGHTS, ratio, tiles=TILES)
    spent = sum(choice.parameters for choice in choices.values())
    budget = sum(w.size for w in WEIGHTS.values()) / ratio
    assert 0.8 * budget < spent <= budget


def test_every_matrix_gets_the_tile_that_suits_it():
    choices = choose_tiles(WEIGHTS, 2, tiles=TILES)
    assert (choices["blocks"].tile, choices["blocks"].rank) == (16, 2)
    assert choices["smooth"].tile is None
    assert choices["smooth"].parameters < choices["noise"].parameters


@pytest.mark.parametrize("weighted", [False, True])
def test_the_errors_are_those_of_the_factors(weighted):
    given = grams() if weighted else None
    choices = choose_tiles(WEIGHTS, 2, tiles=TILES, grams=given)
    for name, choice in choices.items():
        gram = given[name] if given else None
        if choice.rank is not None:
            factors = tsvd(WEIGHTS[name], tile=choice.tile, rank=choice.rank, gram=gram)
            assert abs(float(factors.error(WEIGHTS[name], gram)) - choice.error) < 1e-4
            assert factors.parameters() == choice.parameters


def test_a_spread_budget_beats_an_even_one():
    total = lambda choices: sum(choice.error**2 for choice in choices.values())
    spread = total(choose_tiles(WEIGHTS, 4, tiles=TILES))
    for tile in TILES:
        even = sum(float(tsvd(w, tile=tile, ratio=4).error(w)) ** 2 for w in WEIGHTS.values())
        assert spread < even


def test_a_matrix_may_stay_dense():
    choices = choose_tiles({"noise": NOISE, "smooth": SMOOTH}, 1.5)
    assert choices["noise"].rank is None
    assert (choices["noise"].error, choices["noise"].parameters) == (0.0, NOISE.size)


def test_ranks_are_multiples():
    for choice in measure(NOISE, TILES, rank_multiple=8):
        assert choice.rank is None or choice.rank % 8 == 0


def test_tiles_larger_than_the_matrix_are_passed_over():
    assert {choice.tile for choice in measure(NOISE, (64, 128, 512))} == {64, None}


REFUSED = {
    "nothing": (lambda: choose_tiles({}, 2), "at least one matrix; got none"),
    "ratio": (lambda: choose_tiles({"w": NOISE}, 100), "at most 38.4 for these; got 100"),
    "grams": (
        lambda: choose_tiles({"w": NOISE}, 2, grams={"v": jnp.eye(64)}),
        r"differs in \['v', 'w'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_public_names():
    assert sparsax.TileChoice is type(measure(NOISE, (16,))[0])
