import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax import tsvd, tsvd_common
from sparsax.lowrank import randomized_svd
from tests.helpers import assert_near

D, F = 70, 100


def matrix(rows=D, columns=F, seed=0, decay=0.3):
    """A random matrix whose singular values fall as `k ** -decay`."""
    rng = np.random.default_rng(seed)
    u, s, v = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    return jnp.asarray(u * (s[0] * np.arange(1.0, s.size + 1) ** -decay) @ v, jnp.float32)


def inputs(count=500, features=D, seed=1):
    """Inputs that use a few directions much more than the rest."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((features, features)) * np.arange(1.0, features + 1) ** -1.0
    return jnp.asarray(rng.standard_normal((count, features)) @ mix.T, jnp.float32)


def best_tiles(w, tile, rank):
    """Every tile cut to its rank by NumPy in float64, in a matrix padded by zeros."""
    w = np.asarray(w, np.float64)
    rows, columns = tile
    padded = np.pad(w, ((0, -w.shape[0] % rows), (0, -w.shape[1] % columns)))
    for i, j in itertools.product(
        range(0, padded.shape[0], rows), range(0, padded.shape[1], columns)
    ):
        u, s, v = np.linalg.svd(padded[i : i + rows, j : j + columns], full_matrices=False)
        padded[i : i + rows, j : j + columns] = u[:, :rank] * s[:rank] @ v[:rank]
    return padded[: w.shape[0], : w.shape[1]]


@pytest.mark.parametrize("tile", [None, 10, (35, 20), 32, (64, 48), (70, 9)])
def test_factors_are_the_best_of_their_rank_in_every_tile(tile):
    w = matrix()
    factors = tsvd(w, tile=tile, rank=4)
    pair = (D, F) if tile is None else (tile, tile) if isinstance(tile, int) else tile
    assert (factors.tile, factors.rank) == (pair, 4)
    assert (factors.in_features, factors.out_features) == (D, F)
    assert_near(factors.to_dense(), best_tiles(w, pair, 4), 1e-5, "matrix")
    want = np.linalg.norm(best_tiles(w, pair, 4) - np.asarray(w)) / np.linalg.norm(w)
    assert abs(float(factors.error(w)) - want) < 1e-5


def test_full_rank_loses_nothing_and_padding_stays_zero():
    w = matrix()
    factors = tsvd(w, tile=32, rank=32)
    assert float(factors.error(w)) < 1e-6
    assert (factors.pad_in, factors.pad_out) == (26, 28)
    dense = jnp.einsum("iajr,jirc->iajc", factors.u, factors.v).reshape(96, 128)
    assert float(abs(dense[D:]).max()) < 1e-5
    assert float(abs(dense[:, F:]).max()) < 1e-5


def test_factors_share_the_singular_values_and_their_transpose_is_the_matrix_transposed():
    w = matrix()
    factors = tsvd(w, tile=(35, 20), rank=3)
    norms = lambda x, axis: np.linalg.norm(np.asarray(x), axis=axis)
    assert_near(norms(factors.u, 1), norms(factors.v, 3).transpose(1, 0, 2), 1e-5, "norms")
    assert_near(factors.transpose().to_dense(), factors.to_dense().T, 1e-6, "transpose")


@pytest.mark.parametrize("tile", [None, 10, 32, (35, 20)])
@pytest.mark.parametrize("ratio", [1.5, 2, 4])
def test_a_ratio_is_reached_by_the_largest_rank_that_does(tile, ratio):
    factors = tsvd(matrix(), tile=tile, ratio=ratio)
    per_rank = factors.parameters() / factors.rank
    assert factors.ratio() >= ratio
    assert D * F / (factors.parameters() + per_rank) < ratio
    assert factors.parameters() == factors.u.size + factors.v.size
    assert factors.bytes() == 4 * factors.parameters()
    assert factors.flops(10) == 20 * factors.parameters()


@pytest.mark.parametrize("tile", [None, 10])
@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_an_energy_is_kept_by_the_smallest_rank_that_does(tile, energy):
    w = matrix(decay=0.5)
    rank = tsvd(w, tile=tile, energy=energy).rank
    lost = lambda rank: float(tsvd(w, tile=tile, rank=rank).error(w)) ** 2
    assert lost(rank) <= 1 - energy + 1e-5
    if rank > 1:
        assert lost(rank - 1) > 1 - energy


@pytest.mark.parametrize("tile", [None, 32, 35])
def test_calibration_lowers_the_error_of_the_outputs(tile):
    w, x = matrix(), inputs()
    gram = x.T @ x
    plain, weighted = tsvd(w, tile=tile, rank=8), tsvd(w, tile=tile, rank=8, gram=gram)
    error = lambda f: float(jnp.linalg.norm(x @ (w - f.to_dense())) / jnp.linalg.norm(x @ w))
    assert abs(float(weighted.error(w, gram)) - error(weighted)) < 1e-4
    assert error(weighted) < 0.7 * error(plain)
    assert float(weighted.error(w)) > float(plain.error(w))


def test_calibration_of_a_whole_matrix_is_the_best_there_is():
    w, x = matrix(), inputs()
    got = x @ tsvd(w, rank=8, gram=x.T @ x).to_dense()
    _, s, _ = np.linalg.svd(np.asarray(x @ w, np.float64), full_matrices=False)
    best = np.linalg.norm(s[8:]) / np.linalg.norm(s)
    error = np.linalg.norm(np.asarray(got) - np.asarray(x @ w)) / np.linalg.norm(s)
    assert 0.999 * best <= error < 1.001 * best


def test_calibration_survives_inputs_that_are_never_on():
    x = inputs().at[:, ::3].set(0.0)
    factors = tsvd(matrix(), tile=32, rank=8, gram=x.T @ x)
    assert bool(jnp.isfinite(factors.to_dense()).all())
    zero = tsvd(matrix(), tile=32, rank=8, gram=jnp.zeros((D, D)))
    assert bool(jnp.isfinite(zero.to_dense()).all())


@pytest.mark.parametrize("w", [jnp.zeros((D, F)), jnp.ones((D, F))])
def test_matrices_of_hardly_any_rank(w):
    for factors in (tsvd(w, tile=32, rank=8), tsvd_common(w, tile=32, rank=8)):
        np.testing.assert_allclose(factors.to_dense(), w, atol=1e-5)


def test_randomised_svd_is_as_good_as_the_exact_one():
    w = matrix(80, 120, decay=0.5)
    exact, found = (tsvd(w, tile=40, rank=8, method=m) for m in ("exact", "randomized"))
    assert float(found.error(w)) <= float(exact.error(w)) + 2e-3
    assert exact.u.shape == found.u.shape


def test_randomised_svd_falls_back_on_the_exact_one_and_says_so():
    tiles = np.random.default_rng(0).standard_normal((1, 2, 60, 60))
    with pytest.warns(UserWarning, match=r"2 of 2 tiles had not settled .* decomposed exactly"):
        found = randomized_svd(tiles, 10, tolerance=0.0)
    assert_near(found.values, np.linalg.svd(tiles)[1][..., :10], 1e-6, "values")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        randomized_svd(tiles, 10, tolerance=0.1)


def test_two_runs_give_the_same_bits():
    w, x = matrix(), inputs()
    for options in ({}, {"gram": x.T @ x}, {"method": "randomized"}):
        one, two = (tsvd(w, tile=35, rank=4, **options) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_sixteen_bit_weights_come_back_in_sixteen_bits():
    w = matrix().astype(jnp.bfloat16)
    assert tsvd(w, tile=35, rank=4).u.dtype == jnp.bfloat16
    assert tsvd_common(w, tile=35, rank=4).common.dtype == jnp.bfloat16
    assert tsvd(matrix(), rank=4).astype(jnp.float16).v.dtype == jnp.float16


def test_padded_ranks_are_the_same_matrix():
    factors = tsvd(matrix(), tile=35, rank=5)
    padded = factors.pad_rank(16)
    assert padded.rank == 16
    np.testing.assert_array_equal(padded.to_dense(), factors.to_dense())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tile", [10, 32, 70])
def test_the_common_factor_is_the_best_one_and_orthonormal(side, tile):
    w = matrix(70, 70, decay=0.3)
    factors = tsvd_common(w, tile=tile, rank=6, side=side)
    dense = np.asarray(w if side == "right" else w.T, np.float64)
    stacked = np.pad(dense, ((0, 0), (0, -70 % tile))).reshape(-1, tile)
    s = np.linalg.svd(stacked, compute_uv=False)
    best = np.linalg.norm(s[6:]) / np.linalg.norm(s)
    # Zeros that pad the matrix are approximated as well, but do not count in its error.
    assert float(factors.error(w)) < best + 1e-5
    if 70 % tile == 0:
        assert float(factors.error(w)) > best - 1e-5
    common = factors.common if side == "right" else factors.common.T
    np.testing.assert_allclose(common @ common.T, np.eye(6), atol=1e-5)
    assert (factors.tile, factors.rank) == (tile, 6)
    assert (factors.in_features, factors.out_features) == (70, 70)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_common_factor_reaches_its_ratio(side):
    factors = tsvd_common(matrix(), tile=32, ratio=3, side=side)
    assert factors.ratio() >= 3
    more = tsvd_common(matrix(), tile=32, rank=factors.rank + 1, side=side)
    assert more.ratio() < 3
    uses = 4 if side == "right" else 3
    assert factors.flops(5) == 10 * (factors.tiles.size + uses * factors.common.size)


def test_a_calibrated_common_factor_lowers_the_error_of_the_outputs():
    w, x = matrix(), inputs()
    gram = x.T @ x
    plain, weighted = (tsvd_common(w, tile=20, rank=8, gram=g) for g in (None, gram))
    assert float(weighted.error(w, gram)) < 0.98 * float(plain.error(w, gram))


W = matrix()
REFUSED = {
    "vector": (lambda: tsvd(W[0], rank=1), r"real matrix \[D, F\]; got float32 \(100,\)"),
    "integers": (lambda: tsvd(W.astype(int), rank=1), "real matrix .* got int32"),
    "nan": (lambda: tsvd(W.at[3, 4].set(jnp.nan), rank=1), "w must be finite"),
    "gram_shape": (lambda: tsvd(W, rank=1, gram=jnp.eye(3)), r"\[70, 70\]; got \(3, 3\)"),
    "gram_nan": (lambda: tsvd(W, rank=1, gram=jnp.full((D, D), jnp.inf)), "gram must be finite"),
    "tile": (lambda: tsvd(W, tile=80, rank=1), r"1 <= tile <= \(70, 100\).* got 80"),
    "tile_zero": (lambda: tsvd(W, tile=0, rank=1), "tile must lie within the matrix.*got 0"),
    "nothing": (lambda: tsvd(W), "exactly one of rank, ratio and energy"),
    "two": (lambda: tsvd(W, rank=1, ratio=2), "exactly one of rank, ratio and energy"),
    "rank": (lambda: tsvd(W, tile=10, rank=11), r"rank must be within \[1, 10\].* got 11"),
    "ratio": (lambda: tsvd(W, tile=10, ratio=8), "rank 1 of tiles .* is a ratio of 5; got 8"),
    "ratio_negative": (lambda: tsvd(W, ratio=-1), "ratio must be positive.*got -1"),
    "energy": (lambda: tsvd(W, energy=1.5), r"energy must be within \(0, 1\]; got 1.5"),
    "jit": (lambda: jax.jit(lambda w: tsvd(w, rank=1))(W), "must be concrete.*outside of jit"),
    "method": (lambda: tsvd(W, rank=1, method="fast"), "method must be .* got 'fast'"),
    "randomized_energy": (
        lambda: tsvd(W, energy=0.5, method="randomized"),
        "'exact' for energy=",
    ),
    "side": (lambda: tsvd_common(W, tile=10, rank=1, side="top"), "side must be .* got 'top'"),
    "common_gram": (
        lambda: tsvd_common(W, tile=10, rank=1, side="left", gram=jnp.eye(D)),
        "gram needs side='right'",
    ),
    "common_both": (lambda: tsvd_common(W, tile=10), "exactly one of rank and ratio"),
    "common_rank": (lambda: tsvd_common(W, tile=10, ratio=90), "got 0 from ratio=90"),
    "common_tile": (lambda: tsvd_common(W, tile=101, rank=1), r"tile <= \(100, 100\).* got 101"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_public_names():
    assert sparsax.TiledFactors is type(tsvd(W, rank=1))
    assert sparsax.CommonFactors is type(tsvd_common(W, tile=10, rank=1))
