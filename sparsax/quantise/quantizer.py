"""Codebooks of keys (and queries): fitted by k-means, followed by averages or by a loss."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt8

from sparsax.quantise.codes import BITS, Codes, Score, pack, tables
from sparsax.quantise.kmeans import kmeans, nearest
from sparsax.quantise.vectors import HIGHEST, join, split


class QuantizerStats(typing.NamedTuple):
    """How well a quantizer fits what it was last shown."""

    distortion: Float[Array, ""]  # mean squared distance of a sub-vector from its centroid
    usage: Float[Array, "K M E"]  # share of the sub-vectors that chose a centroid


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """M codebooks for the sub-vectors of every kv head; a token becomes M codes below 16.

    Queries of a group use the codebooks of their kv head. Build one with `fit`.

    Attributes:
        codebooks: centroids, float32 `[K, M, E, d]`, E <= 16, M * d = H.
        weights: running share of the sub-vectors that chose each centroid, float32 `[K, M, E]`.

    Source: Jegou, Douze, Schmid, "Product quantization for nearest neighbor search" (PAMI 2011);
    Gui et al., "SPT" (arXiv 2312.10365), section 4.1.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 2, 128, 4, 32))
        >>> quantizer = sparsax.ProductQuantizer.fit(jax.random.key(1), k, queries=q)
        >>> quantizer.codebooks.shape, quantizer.encode(k).shape
        ((4, 4, 16, 8), (2, 128, 4, 4))
    """

    codebooks: Float[Array, "K M E d"]
    weights: Float[Array, "K M E"]

    @classmethod
    def fit(
        cls,
        key: Key[Array, ""],
        k: Float[Array, "B S K H"],
        *,
        queries: Float[Array, "B S N H"] | None = None,
        key_mask: Bool[Array, "B S"] | None = None,
        num_centroids: int = 16,
        dim: int = 8,
        iterations: int = 20,
    ) -> "ProductQuantizer":
        """The quantizer whose centroids are the k-means of given keys.

        Args:
            key: of the random start; the same key gives the same bits.
            k: keys, e.g. those of the first batch; K heads get codebooks of their own.
            queries: queries that share the codebooks: give them for the score "match", which
                compares codes of both, and leave them out for "adc", which encodes keys alone.
            key_mask: False where a token is padding, which does not count.
            num_centroids: E, at most 16 (four bits).
            dim: features d of a sub-vector, a divisor of H.
            iterations: rounds of k-means.

        Raises:
            ValueError: features do not divide, or there are fewer tokens than centroids.
        """
        _check_heads(k, k.shape[2], dim)
        if not 2 <= num_centroids <= 2**BITS or iterations < 1:
            raise ValueError(
                f"num_centroids must lie within [2, {2**BITS}] and iterations be at least 1; got "
                f"{num_centroids} and {iterations}."
            )
        parts, counts = _samples(k, queries, key_mask, k.shape[2], dim)
        if counts.size < num_centroids:
            raise ValueError(
                f"k-means needs at least num_centroids={num_centroids} tokens for every kv head; "
                f"got {counts.size}. Fit on a larger batch."
            )
        x = jnp.concatenate(parts, 1).astype(jnp.float32)
        books = kmeans(key, x, counts, num_centroids=num_centroids, iterations=iterations)
        _, share = _assign(books, parts, counts)
        return cls(books, share)

    def encode(self, x: Float[Array, "B S N H"]) -> UInt8[Array, "B S N M"]:
        """The nearest centroid of every sub-vector; N is K or a multiple of it."""
        kv_heads, num_codes, _, dim = self.codebooks.shape
        _check_heads(x, kv_heads, dim, num_codes)
        return join(nearest(split(x, kv_heads, dim), self.codebooks), x.shape)

    def codes(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, score: Score = "match"
    ) -> Codes:
        """What scores every query with every key, without a gradient.

        Args:
            q: queries.
            k: keys.
            score: "match", the number of equal codes (the paper's), or "adc" (asymmetric
                distance), which encodes the keys alone: the query's products with their
                centroids, rounded to whole numbers. It ranks better and stores a query in
                2 H bytes rather than in H / 16.
        """
        if score not in typing.get_args(Score):
            raise ValueError(f"score must be one of {typing.get_args(Score)}; got {score!r}.")
        _check_heads(q, self.codebooks.shape[0], self.codebooks.shape[3], self.codebooks.shape[1])
        _check_kv_heads(k, self.codebooks.shape[0])
        q, k, books = lax.stop_gradient((q, k, self.codebooks))
        keys = pack(self.encode(k))
        queries = pack(self.encode(q)) if score == "match" else tables(q, books)
        return Codes(queries, keys, num_codes=books.shape[1])

    def update(
        self,
        k: Float[Array, "B S K H"],
        *,
        queries: Float[Array, "B S N H"] | None = None,
        key_mask: Bool[Array, "B S"] | None = None,
        decay: float = 0.99,
    ) -> tuple["ProductQuantizer", QuantizerStats]:
        """The quantizer after an exponential moving average with a new batch, and statistics.

            weight' = decay weight + (1 - decay) share,
            centroid' = (decay weight centroid + (1 - decay) share mean) / weight'

        A centroid that nothing chose stays where it is while its weight decays. Arguments as of
        `fit`. Source: van den Oord et al., "VQ-VAE" (arXiv 1711.00937), appendix A.1.
        """
        parts, counts = _samples(*lax.stop_gradient((k, queries)), key_mask, *self._shape)
        chosen, share = _assign(self.codebooks, parts, counts)
        x, total = jnp.concatenate(parts, 1), jnp.maximum(counts.sum(), 1.0)
        means = jnp.einsum(
            "knme,knmd->kmed", chosen, x, precision=HIGHEST, preferred_element_type=jnp.float32
        ) / total  # fmt: skip
        weights = decay * self.weights + (1 - decay) * share
        moved = decay * self.weights[..., None] * self.codebooks + (1 - decay) * means
        books = moved / jnp.where(weights > 0, weights, 1.0)[..., None]
        books = jnp.where((share > 0)[..., None], books, self.codebooks)
        distortion = (_error(chosen, x, self.codebooks) * counts[:, None]).sum()
        distortion /= total * x.shape[0] * x.shape[2]
        return ProductQuantizer(books, weights), QuantizerStats(distortion, share)

    def loss(
        self,
        k: Float[Array, "B S K H"],
        *,
        queries: Float[Array, "B S N H"] | None = None,
        key_mask: Bool[Array, "B S"] | None = None,
        commitment: float = 1.0,
    ) -> Float[Array, ""]:
        """Mean of `|sg(x) - c|^2 + commitment |x - sg(c)|^2`, c the nearest centroid of x.

        The paper adds it to the training loss with weight 1e-2. The first term moves the
        centroids alone, the second queries and keys alone (sg stops the gradient).
        """
        parts, counts = _samples(k, queries, key_mask, *self._shape)
        chosen, _ = _assign(*lax.stop_gradient((self.codebooks, parts)), counts)
        x = jnp.concatenate(parts, 1)
        books = _error(chosen, lax.stop_gradient(x), self.codebooks)
        tokens = _error(chosen, x, lax.stop_gradient(self.codebooks))
        total = ((books + commitment * tokens) * counts[:, None]).sum()
        return total / (jnp.maximum(counts.sum(), 1.0) * x.shape[0] * x.shape[2])

    @property
    def _shape(self) -> tuple[int, int]:
        return self.codebooks.shape[0], self.codebooks.shape[3]


def _samples(k, queries, key_mask, kv_heads, dim):
    """Samples of keys and of queries, apart, and 1 for each of all that is not padding."""
    arrays = [x for x in (k, queries) if x is not None]
    for x in arrays:
        _check_heads(x, kv_heads, dim)
    _check_kv_heads(k, kv_heads)
    mask = jnp.ones(k.shape[:2], bool) if key_mask is None else key_mask
    counts = [mask.astype(jnp.float32).repeat(x.shape[2] // kv_heads) for x in arrays]
    return [split(x, kv_heads, dim) for x in arrays], jnp.concatenate(counts)


def _assign(books, parts, counts):
    """Which centroid every sample chose, one-hot `[K, n, M, E]`, and each centroid's share.

    One-hot in the samples' dtype, for whose products with them that is enough. Keys and queries
    choose apart, as in `encode`: within one program XLA finds their codes only once.
    """
    chosen = jnp.concatenate([nearest(x, books) for x in parts], 1)
    chosen = jax.nn.one_hot(chosen, books.shape[2], dtype=jnp.result_type(*parts))
    chosen *= counts[:, None, None].astype(chosen.dtype)
    return chosen, chosen.sum(1, dtype=jnp.float32) / jnp.maximum(counts.sum(), 1.0)


def _error(chosen, x, books):
    """Squared distances from the chosen centroids `[K, n, M]`."""
    centroids = jnp.einsum("knme,kmed->knmd", chosen, books, precision=HIGHEST)
    return jnp.square(x - centroids).sum(-1)


def _check_kv_heads(k, kv_heads) -> None:
    if k.shape[2] != kv_heads:
        raise ValueError(f"k must have the codebooks' K={kv_heads} heads; got {k.shape[2]}.")


def _check_heads(x, kv_heads, dim, num_codes=None) -> None:
    features = None if num_codes is None else num_codes * dim
    if x.ndim != 4 or x.shape[3] % dim or (features is not None and x.shape[3] != features):
        want = f"a multiple of dim={dim}" if features is None else f"{features}"
        raise ValueError(
            f"queries and keys must be [B, length, heads, H], H {want} features; "
            f"got {tuple(x.shape)}."
        )
    if x.shape[2] % kv_heads:
        raise ValueError(
            f"heads must be a multiple of the codebooks' K={kv_heads}; got {x.shape[2]}."
        )
