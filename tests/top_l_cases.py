"""Cases of top-L attention, and a plain Python top-L with the same rules."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sparsax import ProductQuantizer
from tests.helpers import TOLERANCES, Tolerance


def plain_top_l(scores, keep, *, causal, real=None):
    """`[T, S]` kept pairs: sort the keys that a row may see by own key, score, then position."""
    kept = np.zeros(scores.shape, bool)
    for i in range(scores.shape[0]):
        seen = [
            j
            for j in range(scores.shape[1])
            if (j <= i or not causal) and (real is None or real[j])
        ]
        seen.sort(key=lambda j: (j == i, scores[i, j], j), reverse=True)
        kept[i, seen[:keep]] = True
    return kept


def plain_scores(codes):
    """`[B, N, T, S]` by loops over the codes, without packing."""
    queries, keys = np.asarray(codes.query_codes), np.asarray(codes.key_codes)
    keys = keys.repeat(queries.shape[2] // keys.shape[2], axis=2)
    (batch, length, heads), kv_len = queries.shape[:3], keys.shape[1]
    scores = np.zeros((batch, heads, length, kv_len), int)
    for b, n, i in np.ndindex(batch, heads, length):
        mine, others = queries[b, i, n], keys[b, :, n]
        if queries.ndim == 4:
            scores[b, n, i] = (mine == others).sum(-1)
        else:
            scores[b, n, i] = mine[np.arange(len(mine)), others].sum(-1, dtype=int)
    return scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    score: str = "match"
    B: int = 2
    T: int = 72
    N: int = 2
    K: int = 2
    H: int = 32
    keep: int = 9
    causal: bool = True
    padding: str | None = None  # "some" samples are cut, "every" one, or one to nothing: "all"
    scale: float | None = None
    dtype: str = "float32"

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def static(self):
        return {"keep": self.keep, "causal": self.causal, "scale": self.scale}

    @functools.cache  # noqa: B019 - cases are as few as they are, and live as long as the tests
    def inputs(self, seed=0):
        """`q, k, v, do, codes, key_mask`."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        draw = lambda heads, gain=1.0: jnp.asarray(
            gain * rng.standard_normal((self.B, self.T, heads, self.H)), self.dtype
        )
        q, k, v, do = draw(self.N, 2.0), draw(self.K), draw(self.K), draw(self.N)
        books = jnp.asarray(rng.standard_normal((self.K, self.H // 8, 16, 8)), jnp.float32)
        quantizer = ProductQuantizer(books, jnp.ones(books.shape[:3]))
        key_mask = None
        if self.padding is not None:
            most = self.T // 2 if self.padding == "every" else self.T
            real = np.linspace(most, 0 if self.padding == "all" else self.T // 3, self.B)
            key_mask = jnp.asarray(np.arange(self.T) < real.astype(int)[:, None])
            if self.padding == "holes":
                key_mask = jnp.asarray(rng.random((self.B, self.T)) < 0.6)
        encode = jax.jit(ProductQuantizer.codes, static_argnames="score")
        return q, k, v, do, encode(quantizer, q, k, score=self.score), key_mask


CASES = (
    Case(name="match"),
    Case(name="adc", score="adc"),
    Case(name="adc_bidirectional", score="adc", causal=False),
    Case(name="gqa", N=4, score="adc"),
    Case(name="mqa", N=3, K=1),
    Case(name="two_words", H=128, N=1, K=1),
    Case(name="odd_codes", H=40),
    Case(name="several_tiles", B=1, T=300, keep=37, N=1, K=1),
    Case(name="one_key", keep=1),
    Case(name="padding", padding="some", N=4),
    Case(name="padding_all", padding="all", score="adc", causal=False),
    Case(name="holes", padding="holes"),
    Case(name="scale", scale=0.7),
    Case(name="bf16", dtype="bfloat16", N=4, T=128, keep=16),
    Case(name="bf16_adc", dtype="bfloat16", score="adc", T=128, keep=16),
    Case(name="f16", dtype="float16", padding="some", T=128, keep=16),
    Case(name="f16_adc", dtype="float16", score="adc", causal=False),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)
