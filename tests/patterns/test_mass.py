import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax.patterns import layer_weights, mass, quality

LENGTH, BLOCK = 64, 8


def score_maps(*leading, causal=False, length=LENGTH, seed=0):
    """Rows of probabilities; later maps are sharper, so that they need fewer blocks."""
    rng = np.random.default_rng(seed)
    sharpness = np.linspace(0.5, 3.0, int(np.prod(leading))).reshape(*leading, 1, 1)
    logits = sharpness * rng.standard_normal((*leading, length, length))
    if causal:
        logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    weights = np.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def plain_mass(grid, block):
    """Means over queries of sums over keys, block by block."""
    starts = range(0, len(grid), block)
    part = lambda i, j: grid[i : i + block, j : j + block].astype(np.float64)
    return np.array([[part(i, j).sum(1).mean() for j in starts] for i in starts])


def plain_search(maps, block, *, density=None, cover=None, spread="model", band=1, causal=False,
                 equal_rows=True, objective=None, weights=None):  # fmt: skip
    """The search as one would write it down: lists of (gain, place), sorted; [L, P, T, T]."""
    layers, heads = maps.shape[:2]
    masses = np.array(
        [[plain_mass(maps[i, j], block) for j in range(heads)] for i in range(layers)]
    )
    n = masses.shape[-1]
    groups = {
        "model": [[(i, j) for i in range(layers) for j in range(heads)]],
        "layer": [[(i, j) for j in range(heads)] for i in range(layers)],
        "head": [[(i, j)] for i in range(layers) for j in range(heads)],
    }[spread]
    mask = np.zeros(masses.shape, bool)
    for group in groups:
        forced, others, total, held = [], [], 0.0, 0.0
        for i, j in group:
            weight = (
                1.0 if weights is None else np.broadcast_to(weights.T, maps.shape[1::-1]).T[i, j]
            )
            for row in range(n):
                whole = masses[i, j, row].sum() if equal_rows else 1.0
                own = [(masses[i, j, row, col] / (whole or 1.0), (i, j, row, col))
                       for col in range(row + 1 if causal else n)]  # fmt: skip
                total += sum(value for value, _ in own)
                forced += [x for x in own if abs(row - x[1][3]) <= band]
                free = sorted((x for x in own if x not in forced), key=lambda x: -x[0])
                if cover is not None or objective == "mass":
                    others += [(weight * value, place) for value, place in free]
                    continue
                share = masses[i, j, row].sum() / (
                    whole or 1.0
                )  # of the samples, below 1 if padded
                lost = share - sum(value for value, place in own if abs(row - place[3]) <= band)
                for value, place in free:
                    others.append(
                        (weight * (lost**2 - (lost - value) ** 2) / (share or 1.0), place)
                    )
                    lost -= value
        listable = len(forced) + len(others)
        others.sort(key=lambda x: -x[0])
        for number, (value, place) in enumerate(forced + others):
            if number < len(forced):
                mask[place] = True
            elif cover is None:
                mask[place] = number < round(density * listable)
            else:
                mask[place] = held < cover * total
            held += value
    return mask


@pytest.mark.parametrize("settings", [
    {"density": 0.5}, {"density": 0.45, "causal": True}, {"density": 0.4, "spread": "layer"},
    {"density": 0.3, "spread": "head", "band": 0}, {"density": 0.7, "band": 2, "causal": True},
    {"cover": 0.6}, {"cover": 0.9, "spread": "layer", "causal": True},
    {"cover": 0.8, "spread": "head", "equal_rows": False}, {"density": 1.0}, {"cover": 1.0},
    {"density": 0.5, "objective": "mass"}, {"density": 0.5, "equal_rows": False},
    {"density": 0.45, "causal": True, "objective": "mass", "weights": np.array([1.0, 0.3, 2.0])},
    {"density": 0.5, "objective": "square", "weights": np.array([1.0, 0.3, 2.0])},
    {"density": 0.5, "spread": "layer", "weights": np.array([[1, 3], [0.1, 2], [0.3, 0.0]])},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("under_jit", [False, True])
def test_search_is_the_plain_search(settings, under_jit):
    maps = score_maps(3, 2, causal=settings.get("causal", False))
    maps[:, :, 40:] *= 0.25  # the last rows are padding in most samples
    search = functools.partial(mass.search, block=BLOCK, **settings)
    pattern = (jax.jit(search) if under_jit else search)(jnp.asarray(maps))
    want = plain_search(maps, BLOCK, **settings)
    np.testing.assert_array_equal(pattern.to_block_mask(), want)
    assert bool(pattern.valid().all())


@pytest.mark.parametrize("seed", range(5))
def test_no_block_above_the_diagonal_is_listed_however_sums_round(seed):
    maps = score_maps(3, 2, causal=True, seed=seed)
    mask = mass.search(maps, block=BLOCK, cover=1.0, causal=True).to_block_mask()
    assert not (mask & ~np.tri(LENGTH // BLOCK, dtype=bool)).any()


@pytest.mark.parametrize("length", [64, 61])
def test_mass_is_the_plain_mass_and_rows_add_up_to_one(length):
    maps = score_maps(2, 1, length=length)
    got = mass.block_mass(maps, block=BLOCK)
    np.testing.assert_allclose(got[1, 0], plain_mass(maps[1, 0], BLOCK), rtol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)


def test_a_sharp_layer_leaves_its_blocks_to_the_others():
    gap = abs(np.arange(LENGTH) - np.arange(LENGTH)[:, None])
    sharp, flat = np.exp(-gap / 2.0), np.exp(-gap / 40.0)
    maps = np.stack([x / x.sum(-1, keepdims=True) for x in (sharp, flat)])[:, None]
    densities = mass.search(maps.astype(np.float32), block=BLOCK, density=0.6).density()
    assert densities[0] < 0.4 < 0.8 < densities[1]
    np.testing.assert_allclose(densities.mean(), 0.6, atol=1 / 128)


@pytest.mark.parametrize("causal", [False, True])
def test_pooled_maps_give_the_same_pattern(causal):
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 60, 4, 16))
    of = functools.partial(sparsax.score_map, 3 * q, k, causal=causal, per_head=True)
    find = functools.partial(mass.search, block=BLOCK, density=0.6, causal=causal)
    whole, pooled = find(of()), find(of(pool=BLOCK), length=60)
    np.testing.assert_array_equal(whole.to_block_mask(), pooled.to_block_mask())
    assert whole.num_heads == 4
    assert len({x.tobytes() for x in np.asarray(whole.to_block_mask())}) > 1


def test_search_can_be_vmapped():
    maps = jnp.stack([jnp.asarray(score_maps(2, 1, seed=seed)) for seed in range(3)])
    search = functools.partial(mass.search, block=BLOCK, density=0.5)
    got = jax.vmap(search)(maps)
    for one, each in zip(got.to_block_mask(), maps, strict=True):
        np.testing.assert_array_equal(one, search(each).to_block_mask())


@pytest.mark.parametrize(("shape", "valid"), [
    ((LENGTH, LENGTH), [False]), ((2, LENGTH, LENGTH), [False, False]),
])  # fmt: skip
def test_single_maps_and_heads_that_are_not_finite_are_invalid_under_jit(shape, valid):
    maps = score_maps(*shape[:-2])
    search = functools.partial(mass.search, block=BLOCK, density=0.5)
    assert search(maps).kv_num_blocks.shape == (*(shape[:-2] or (1,)), LENGTH // BLOCK)
    maps[..., 3, 5] = np.nan
    np.testing.assert_array_equal(jax.jit(search)(maps).valid(), valid)


def test_nan_spoils_those_that_share_its_budget():
    maps = score_maps(3, 2)
    maps[1, 0, 3, 5] = np.nan
    wanted = {
        "model": np.zeros((3, 2), bool), "layer": [[True, True], [False, False], [True, True]],
        "head": [[True, True], [False, True], [True, True]],
    }  # fmt: skip
    for spread, valid in wanted.items():
        search = functools.partial(mass.search, block=BLOCK, density=0.5, spread=spread)
        np.testing.assert_array_equal(jax.jit(search)(maps).valid(), valid)


def test_squares_spread_a_causal_layer_over_its_rows_and_mass_does_not():
    # Attention alike to all that came before: first rows have few keys, and much mass in each.
    maps = np.tri(LENGTH, dtype=np.float32)
    maps /= maps.sum(-1, keepdims=True)
    search = functools.partial(mass.search, maps, block=BLOCK, density=0.7, causal=True)
    rows = lambda objective: np.asarray(search(objective=objective).to_block_mask())[0].sum(-1)
    assert rows("mass").tolist() == [1, 2, 3, 4, 5, 6, 2, 2]  # nothing but the band at the end
    assert (np.diff(rows("square")) >= 0).all()
    assert rows("square")[-2:].tolist() == [4, 4]


def test_what_a_loss_minds_gets_the_blocks():
    maps = score_maps(3, 2, causal=True)
    own = np.asarray(mass.equal_rows_of(mass.block_mass(maps, block=BLOCK)))
    minds, called = np.array([0.1, 0.0, 2.0]), []

    def loss(pattern):
        mask = np.asarray(pattern.to_block_mask())
        called.append(str(jax.tree.map(jnp.shape, pattern)))
        return 0.7 + (minds[:, None, None] * (1 - (own * mask).sum(-1)) ** 2).mean((1, 2)).sum()

    weights = layer_weights(loss, maps, block=BLOCK, causal=True)
    np.testing.assert_allclose(weights, minds / minds.mean(), atol=1e-4)
    assert (len(called), len(set(called))) == (4, 1)
    found = mass.search(maps, block=BLOCK, density=0.6, causal=True, weights=weights)
    each = np.asarray(found.density()).reshape(3, -1).mean(-1)
    assert each[1] < each[0] < each[2]
    even = mass.search(maps, block=BLOCK, density=0.6, causal=True)
    assert float(loss(found)) < float(loss(even))
    assert layer_weights(lambda _: 1.0, maps, block=BLOCK).tolist() == [1.0] * 3


def test_padding_leaves_weights_as_they_are():
    maps = score_maps(2, 1)
    maps[1] = maps[0]
    padded = maps.copy()
    padded[:, :, 32:] = 0.0  # queries that are padding in every sample
    minds = np.array([1.0, 1.0])
    for each in (maps, padded):
        own = np.asarray(mass.block_mass(each, block=BLOCK))

        def loss(pattern, own=own):
            mask = np.asarray(pattern.to_block_mask())
            lost = own.sum(-1) - (own * mask).sum(-1)
            return (minds[:, None, None] * lost**2).sum()

        for equal_rows in (True, False):
            weights = layer_weights(loss, each, block=BLOCK, equal_rows=equal_rows)
            np.testing.assert_allclose(weights, [1.0, 1.0], rtol=1e-5)
    cut = np.stack([maps[0], maps[0] * (np.arange(LENGTH) < 32)[:, None]])  # padding in one layer
    for equal_rows in (True, False):
        weights = layer_weights(loss_of(cut), cut, block=BLOCK, equal_rows=equal_rows)
        np.testing.assert_allclose(weights, [1.0, 1.0], rtol=1e-5)


def loss_of(maps):
    """The mean square of the mass that rows lose, over those that are there; of all layers."""
    own = np.asarray(mass.block_mass(maps, block=BLOCK))

    def loss(pattern):
        rows = own.sum(-1)
        lost = (rows - (own * np.asarray(pattern.to_block_mask())).sum(-1)) ** 2
        return (lost.sum((1, 2)) / rows.sum((1, 2))).sum()

    return loss


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_equal_size_holds_more_than_the_best(causal):
    maps = score_maps(2, 2, causal=causal)
    each = mass.block_mass(maps, block=BLOCK)
    find = functools.partial(
        mass.search, maps, block=BLOCK, causal=causal, density=0.5, objective="mass"
    )
    best = find(band=0, spread="layer", equal_rows=False)
    # The diagonal is forced, so the best of all is at least as good.
    held = quality.pattern_mass(best, each)
    np.testing.assert_array_less(held, quality.best_mass(best, each) + 1e-6)
    np.testing.assert_allclose(held, quality.best_mass(best, each), atol=0.05)
    masks, plain = np.asarray(best.to_block_mask()), np.asarray(each)
    for layer in range(2):
        want = plain[layer][masks[layer]].sum() / plain[layer].sum()
        np.testing.assert_allclose(held[layer], want, rtol=1e-5)
        count, ordered = masks[layer].sum(), np.sort(plain[layer].reshape(-1))[::-1]
        want = ordered[:count].sum() / ordered.sum()
        np.testing.assert_allclose(quality.best_mass(best, each)[layer], want, rtol=1e-5)


def test_a_shared_pattern_is_measured_by_the_mean_of_the_heads():
    each = mass.block_mass(score_maps(2, 3), block=BLOCK)
    shared = mass.search(
        each.mean(1, keepdims=True) / BLOCK, block=BLOCK, density=0.5, length=LENGTH
    )
    mean = each.mean(1, keepdims=True)
    for measure in (quality.pattern_mass, quality.best_mass):
        np.testing.assert_allclose(measure(shared, each), measure(shared, mean), rtol=1e-5)
