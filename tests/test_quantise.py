import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsax import ProductQuantizer
from sparsax.quantise import codes as scoring
from sparsax.quantise.kmeans import kmeans, nearest
from sparsax.quantise.vectors import UNROLLED
from tests.helpers import assert_near

B, S, N, K, H = 2, 40, 4, 2, 24
FIT = jax.jit(ProductQuantizer.fit, static_argnames=("num_centroids", "iterations"))


def tokens(heads, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), (B, S, heads, H)).astype(dtype)


def quantizer(seed=0):
    books = jax.random.normal(jax.random.key(seed + 100), (K, H // 8, 16, 8))
    return ProductQuantizer(books, jnp.full(books.shape[:3], 1 / 16))


def plain_codes(books, x):
    """The nearest centroid by loops, in float64."""
    books, x = np.asarray(books, np.float64), np.asarray(x, np.float64)
    group = x.shape[2] // books.shape[0]
    codes = np.zeros((*x.shape[:3], books.shape[1]), int)
    for b, s, n, m in np.ndindex(codes.shape):
        part = x[b, s, n, 8 * m : 8 * m + 8]
        codes[b, s, n, m] = ((books[n // group, m] - part) ** 2).sum(-1).argmin()
    return codes


@pytest.mark.parametrize("heads", [K, N])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_the_nearest_centroids_of_the_own_kv_head(heads, dtype):
    x = tokens(heads, dtype=dtype)
    codes = quantizer().encode(x)
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, plain_codes(quantizer().codebooks, x))


@pytest.mark.parametrize("dim", [1, 8, 40])  # 40: more features than are written out
def test_the_first_of_equal_centroids_is_chosen(dim):
    assert (16 * dim > UNROLLED) == (dim == 40)
    rng = np.random.default_rng(dim)
    books = rng.integers(-2, 3, (K, 3, 16, dim)).astype(np.float32)  # whole, so sums are exact
    books[:, :, 8:] = books[:, :, 7::-1]
    x = rng.integers(-2, 3, (K, 50, 3, dim)).astype(np.float32)
    gaps = ((x[:, :, :, None] - books[:, None]) ** 2).sum(-1)  # K n M E
    codes = nearest(jnp.asarray(x), jnp.asarray(books))
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, gaps.argmin(-1))
    assert np.unique(codes).size == np.unique(gaps.argmin(-1)).size > 1


@pytest.mark.parametrize("score", ["match", "adc"])
def test_samples_mapped_over_have_the_codes_of_the_batch(score):
    pq, q, k = quantizer(), tokens(N), tokens(K, 1)
    encode = lambda q, k: pq.codes(q[None], k[None], score=score)
    for ours, alone in zip(
        jax.tree.leaves(jax.jit(lambda q, k: pq.codes(q, k, score=score))(q, k)),
        jax.tree.leaves(jax.jit(jax.vmap(encode))(q, k)), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, alone[:, 0])


@pytest.mark.parametrize("dim", [8, 40])
def test_tables_are_products_rounded_to_their_range(dim):
    rng = np.random.default_rng(dim)
    books = rng.standard_normal((K, 3, 16, dim)).astype(np.float32)
    q = rng.standard_normal((B, S, N, 3 * dim)).astype(np.float32)
    grouped = q.reshape(B, S, K, -1, 3, dim).astype(np.float64)
    products = np.einsum("bskgmd,kmed->bskgme", grouped, books).reshape(B, S, N, 3, 16)
    above = products - products.min(-1, keepdims=True)
    want = 255 * above / above.max((-2, -1), keepdims=True)
    table = np.asarray(scoring.tables(jnp.asarray(q), jnp.asarray(books)), np.float64)
    assert np.abs(table - want).max() < 0.5 + 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000))
def test_tiles_of_rows_are_alike(length):
    rows = scoring.tile_rows(length)
    assert rows % 8 == 0
    assert rows <= scoring.QUERY_TILE
    tiles = -(-length // rows)
    assert tiles == -(-length // scoring.QUERY_TILE)
    assert tiles * rows - length < 8 * tiles


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(num_codes, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (3, num_codes)).astype(np.uint8)
    words = scoring.pack(jnp.asarray(codes))
    assert words.shape == (3, -(-num_codes // 8))
    np.testing.assert_array_equal(scoring.unpack(words, num_codes), codes)


@pytest.mark.parametrize("features", [8, 24, 64, 72, 128])
def test_match_counts_equal_codes(features):
    rng = np.random.default_rng(features)
    q, k = (rng.integers(0, 16, (1, n, 1, features // 8)).astype(np.uint8) for n in (30, 50))
    k[:, :30][rng.random((1, 30, 1, features // 8)) < 0.5] = 3
    q[rng.random(q.shape) < 0.5] = 3
    words = [scoring.pack(jnp.asarray(x)) for x in (q, k)]
    got = scoring.tile_scores(
        words[0], scoring.ready_keys(*words, features // 8), jnp.arange(100, 130), None,
        num_codes=features // 8, causal=False,
    )  # fmt: skip
    np.testing.assert_array_equal(got[0, 0, 0], (q[0, :, 0][:, None] == k[0, :, 0]).sum(-1))


def test_adc_ranks_keys_as_products_with_their_centroids_do():
    q, k, pq = tokens(N), tokens(K, 1), quantizer()
    codes = pq.codes(q, k, score="adc")
    ready = scoring.ready_keys(codes.queries, codes.keys, codes.num_codes)
    got = scoring.tile_scores(
        codes.queries, ready, jnp.arange(100, 100 + S), None, num_codes=3, causal=False
    ).reshape(B, N, S, S)
    books = np.asarray(pq.codebooks)
    for b, n in np.ndindex(B, N):
        mine = np.asarray(q[b, :, n]).reshape(S, 3, 8)
        products = np.einsum("tmd,med->tme", mine, books[n // 2])
        near = np.asarray(codes.key_codes[b, :, n // 2])
        want = products[:, np.arange(3), near].sum(-1)  # T S
        want = want - products.min(-1).sum(-1, keepdims=True)
        step = (products.max(-1) - products.min(-1)).max(-1) / 255
        assert np.abs(np.asarray(got[b, n]) * step[:, None] - want).max() <= 1.5 * step.max() + 1e-4


def test_tables_fill_their_range_and_equal_products_give_zeros():
    table = np.asarray(scoring.tables(tokens(N), quantizer().codebooks))
    assert table.min(-1).max() == 0
    assert (table.max((-2, -1)) == 255).all()
    zero = scoring.tables(jnp.zeros((1, 2, N, H)), quantizer().codebooks)
    np.testing.assert_array_equal(zero, 0)


def test_codes_carry_no_gradient():
    def loss(q, k):
        return quantizer().codes(q, k, score="adc").queries.astype(jnp.float32).sum()

    for gradient in jax.grad(loss, (0, 1))(tokens(N), tokens(K)):
        np.testing.assert_array_equal(gradient, 0.0)


def clusters(n=400, count=16):
    """Points of `count` clusters far apart, `[K, n, M, d]`, and their centres."""
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((count, 8))
    x = centres[rng.integers(0, count, n)] + 0.01 * rng.standard_normal((n, 8))
    return jnp.asarray(x[None, :, None], jnp.float32), centres


def test_kmeans_finds_clusters_and_repeats_itself():
    x, centres = clusters()
    runs = [
        kmeans(jax.random.key(seed), x, jnp.ones(400), num_centroids=16, iterations=10)
        for seed in (1, 1)
    ]
    np.testing.assert_array_equal(*runs)
    gaps = np.linalg.norm(np.asarray(runs[0])[0, 0][:, None] - centres, axis=-1)
    assert np.sort(gaps.min(0)).max() < 0.1


def test_an_iteration_of_kmeans_lowers_the_error():
    x = tokens(1).reshape(1, B * S, 3, 8)
    error = []
    for iterations in (1, 15):
        c = kmeans(jax.random.key(0), x, jnp.ones(80), num_centroids=16, iterations=iterations)
        error.append(float(((x[0, :, :, None] - c[0]) ** 2).sum(-1).min(-1).mean()))
    assert error[1] < 0.97 * error[0]


def test_empty_clusters_move_to_the_farthest_samples():
    from sparsax.quantise import kmeans as module

    x, centres = clusters()
    start = jnp.tile(jnp.asarray(centres[:1], jnp.float32), (16, 1))
    spread, module._spread = module._spread, lambda *_: start
    try:
        found = module._kmeans(jax.random.key(0), x[0, :, 0], jnp.ones(400), 16, 30)
    finally:
        module._spread = spread
    chosen = module.nearest(x, found[None, None])
    assert len(np.unique(chosen)) == 16


def test_few_distinct_samples_stay_finite():
    x = jnp.tile(tokens(K)[:, :2], (1, 20, 1, 1))
    pq = FIT(jax.random.key(0), x)
    assert bool(jnp.isfinite(pq.codebooks).all())
    assert float(pq.loss(x)) < 1e-10


def test_padding_does_not_count():
    x, real = tokens(K), jnp.arange(S) < jnp.array([[30], [20]])
    noise = jnp.where(real[..., None, None], x, 1e3)
    for f in (
        lambda x: FIT(jax.random.key(0), x, key_mask=real),
        lambda x: quantizer().update(x, key_mask=real),
        lambda x: quantizer().loss(x, key_mask=real),
    ):
        jax.tree.map(np.testing.assert_array_equal, f(x), f(noise))
    assert float(jnp.abs(FIT(jax.random.key(0), noise).codebooks).max()) > 100


def test_update_is_the_moving_average_of_shares_and_means():
    pq, k, q, decay = quantizer(), tokens(K), tokens(N, 1), 0.8
    new, stats = pq.update(k, queries=q, decay=decay)
    books = np.asarray(pq.codebooks, np.float64)
    for h, m in np.ndindex(K, 3):
        own = [k[:, :, h], q[:, :, 2 * h], q[:, :, 2 * h + 1]]
        x = np.concatenate([np.asarray(y).reshape(-1, 3, 8)[:, m] for y in own])
        nearest = ((x[:, None] - books[h, m]) ** 2).sum(-1).argmin(-1)
        for e in range(16):
            mine = x[nearest == e]
            share = len(mine) / len(x)
            weight = decay / 16 + (1 - decay) * share
            total = decay / 16 * books[h, m, e] + (1 - decay) * mine.sum(0) / len(x)
            want = total / weight if len(mine) else books[h, m, e]
            np.testing.assert_allclose(new.codebooks[h, m, e], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(new.weights[h, m, e], weight, rtol=1e-5)
            np.testing.assert_allclose(stats.usage[h, m, e], share, rtol=1e-5)
    assert_near(2 * stats.distortion, pq.loss(k, queries=q), 1e-5, "distortion")


def test_update_of_bfloat16_sums_in_float32():
    many = jnp.tile(tokens(K, dtype="bfloat16"), (1, 10, 1, 1))  # counts too large for bfloat16
    step = jax.jit(lambda k: quantizer().update(k, decay=0.1))
    near = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, step(many), step(many.astype("float32")))


def test_repeated_updates_lower_the_distortion():
    pq, k = quantizer(), tokens(K)
    step = jax.jit(lambda pq: pq.update(k, decay=0.5))
    errors = []
    for _ in range(15):
        pq, stats = step(pq)
        errors.append(float(stats.distortion))
    assert errors[-1] < 0.7 * errors[0]


def test_each_side_of_the_loss_is_stopped():
    pq, k = quantizer(), tokens(K)
    loss = lambda pq, k, commitment: pq.loss(k, commitment=commitment)
    (books, tokens_), (only_books, none) = (jax.grad(loss, (0, 1))(pq, k, c) for c in (1.0, 0.0))
    np.testing.assert_array_equal(none, 0.0)
    np.testing.assert_array_equal(books.codebooks, only_books.codebooks)
    chosen = jnp.take_along_axis(
        pq.codebooks, pq.encode(k).transpose(2, 3, 0, 1).reshape(K, 3, -1, 1).astype(int), 2
    )
    near = chosen.reshape(K, 3, B, S, 8).transpose(2, 3, 0, 1, 4).reshape(k.shape)
    assert_near(tokens_, 2 * (k - near) / (B * S * K * 3), 1e-5, "tokens")
    assert float(jnp.abs(books.codebooks).max()) > 0


REFUSED = {
    "features": (
        lambda: ProductQuantizer.fit(jax.random.key(0), jnp.ones((1, 40, 2, 12))),
        r"H a multiple of dim=8 features; got \(1, 40, 2, 12\)",
    ),
    "centroids": (
        lambda: ProductQuantizer.fit(jax.random.key(0), tokens(K), num_centroids=17),
        r"num_centroids must lie within \[2, 16\].*got 17 and 20",
    ),
    "few": (
        lambda: ProductQuantizer.fit(jax.random.key(0), tokens(K)[:1, :10]),
        "at least num_centroids=16 tokens for every kv head; got 10",
    ),
    "heads": (lambda: quantizer().encode(tokens(3)), "multiple of the codebooks' K=2; got 3"),
    "other": (
        lambda: quantizer().encode(jnp.ones((1, 4, 2, 32))),
        r"H 24 features; got \(1, 4, 2, 32\)",
    ),
    "keys": (
        lambda: quantizer().codes(tokens(N), tokens(N)),
        "k must have the codebooks' K=2 heads; got 4",
    ),
    "score": (
        lambda: quantizer().codes(tokens(N), tokens(K), score="dot"),
        r"score must be one of \('match', 'adc'\); got 'dot'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_codes_are_exported():
    quantizer = ProductQuantizer(jnp.zeros((2, 4, 16, 4)), jnp.ones((2, 4, 16)))
    run = jax.jit(lambda q, k: quantizer.codes(q, k).keys)
    q, k = (jax.ShapeDtypeStruct((1, 32, n, 16), jnp.float32) for n in (4, 2))
    exported = jax.export.export(run, platforms=("cpu", "tpu"))(q, k)  # refuses unsafe calls
    assert "LayoutConstraint" not in exported.mlir_module()
