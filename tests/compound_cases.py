"""One list of cases of compound attention, with the tolerances of `tests.helpers`."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsax import Band, CompoundPattern, patterns
from sparsax.patterns import compound
from tests.helpers import TOLERANCES, Tolerance


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    projected: tuple[jax.Array, ...]  # q_global, k_global, v_global; or none
    do: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: B T N K H as everywhere; `make(case)` builds the pattern."""

    name: str
    make: Callable[["Case"], CompoundPattern]
    B: int = 2
    T: int = 70
    N: int = 2
    K: int = 2
    H: int = 16
    own: bool = False  # global rows with projections of their own
    scale: float | None = None
    dtype: str = "float32"

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    def pattern(self) -> CompoundPattern:
        return self.make(self)

    def inputs(self, seed: int = 0) -> Inputs:
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        draw = lambda *shape, gain=1.0: jnp.asarray(gain * rng.standard_normal(shape), self.dtype)
        q = draw(self.B, self.T, self.N, self.H, gain=2.0)
        k, v = draw(self.B, self.T, self.K, self.H), draw(self.B, self.T, self.K, self.H)
        projected = ()
        if self.own:
            rows = self.pattern().rows.shape[-1]
            projected = draw(self.B, rows, self.N, self.H), draw(*k.shape), draw(*k.shape)
        return Inputs(q, k, v, projected, draw(*q.shape))


def parts(**kwargs):
    return lambda c: CompoundPattern.from_parts(c.T, **kwargs)


def lengths(c, *kept):
    return np.arange(c.T) < np.array(kept)[:, None]


SCATTERED = np.array([[0, 61, 17, 33, 5], [44, 2, 9, 0, 0]])
COUNTS = np.array([5, 3])


def longformer(window=4, positions=SCATTERED, counts=COUNTS, kept=None, **kwargs):
    return lambda c: compound.longformer(
        c.T, window=window, positions=positions, counts=counts,
        token_mask=None if kept is None else lengths(c, *kept), **kwargs,
    )  # fmt: skip


def everything(c, heads=1, causal=True):
    return CompoundPattern.from_parts(
        c.T, bands=[Band(5, 3), Band(4, 4, 3), Band(30, -28)], columns=SCATTERED,
        num_columns=COUNTS, rows=SCATTERED[:1, 1:3],
        blocks=patterns.random(c.T, blocks_per_row=2, heads=heads, block=16, seed=2),
        elements=compound.random_elements(c.T, keys_per_query=3, heads=heads, seed=3),
        token_mask=lengths(c, c.T, 50), causal=causal,
    )  # fmt: skip


ALL = lambda c: compound.longformer(c.T, window=2, positions=np.arange(c.T)[None])
QDS = lambda c: compound.qds(
    c.T, window=6, query_lens=np.array([4, 7]), max_query_len=8,
    sentence_starts=np.array([[4, 20, 31, 60], [7, 25, 39, 0]]), num_sentences=np.array([4, 3]),
)  # fmt: skip
BLOCKS = lambda heads: (
    lambda c: compound.bigbird(
        c.T, block=8, random_blocks=1, heads=heads, token_mask=lengths(c, c.T, 55)
    )
)
ELEMENTS = lambda heads: (
    lambda c: CompoundPattern.from_parts(
        c.T, elements=compound.random_elements(c.T, keys_per_query=5, heads=heads)
    )
)

CASES = (
    Case(name="window", make=parts(bands=[Band(5, 3)])),
    Case(name="window_many_tiles", T=300, B=1, make=parts(bands=[Band(20, 20)])),
    Case(name="window_one_key_back", make=parts(bands=[Band(1, 0)])),
    Case(name="window_larger_than_the_sequence", T=40, make=parts(bands=[Band(100, 77)])),
    Case(name="window_causal", make=parts(bands=[Band(9, 9)], causal=True)),
    Case(name="one_token", T=1, make=parts(bands=[Band(3, 3)])),
    Case(name="dilated", make=parts(bands=[Band(3, 3, 4)])),
    Case(name="dilated_beyond_the_sequence", T=10, make=parts(bands=[Band(3, 3, 20)])),
    Case(name="bands_that_overlap", make=parts(bands=[Band(5, 3), Band(3, 2, 2), Band(8, -2)])),
    Case(name="strided", make=lambda c: compound.strided(c.T, stride=8)),
    Case(
        name="vertical_slash",
        make=lambda c: compound.vertical_slash(
            c.T, columns=SCATTERED, counts=COUNTS, offsets=[0, 1, 2, 30]
        ),
    ),
    Case(name="columns", make=parts(columns=SCATTERED, num_columns=COUNTS)),
    Case(name="columns_shared_causal", make=parts(columns=SCATTERED[:1], causal=True)),
    Case(name="rows", make=parts(rows=SCATTERED, num_rows=COUNTS)),
    Case(name="rows_causal", make=parts(rows=SCATTERED, num_rows=COUNTS, causal=True)),
    Case(name="longformer", make=longformer()),
    Case(name="longformer_own", make=longformer(), own=True),
    Case(name="longformer_padded_own", make=longformer(kept=(70, 40)), own=True, N=4),
    Case(name="longformer_padding_all", make=longformer(kept=(30, 0)), own=True),
    Case(name="longformer_dilated_causal", make=longformer(dilation=3, causal=True), own=True),
    Case(name="selected_within_the_window", make=longformer(window=60)),
    Case(name="all_selected", T=30, make=ALL, own=True),
    Case(name="none_selected", make=longformer(counts=np.array([0, 0])), own=True),
    Case(name="none_selected_at_all", make=longformer(positions=None, counts=None)),
    Case(name="repeated", make=longformer(positions=np.full((2, 5), 7)), own=True),
    Case(name="no_part", make=parts()),
    Case(name="qds", make=QDS),
    Case(name="etc", make=lambda c: compound.etc(c.T, window=6, num_global=9)),
    Case(name="bigbird", make=BLOCKS(1)),
    Case(name="bigbird_per_head", make=BLOCKS(4), N=4),
    Case(name="elements", make=ELEMENTS(1)),
    Case(name="elements_per_head", make=ELEMENTS(4), N=4, T=130),
    Case(name="everything", make=everything, own=True),
    Case(name="everything_per_kv_head", make=lambda c: everything(c, 2), N=4, own=True),
    Case(name="everything_per_head", make=lambda c: everything(c, 4, False), N=4, own=True),
    Case(name="mqa", make=longformer(), N=4, K=1, own=True, scale=0.7),
    Case(name="bf16", dtype="bfloat16", make=longformer(window=12), H=32, own=True),
    Case(name="bf16_blocks", dtype="bfloat16", make=BLOCKS(1)),
    Case(name="f16", dtype="float16", make=longformer(window=12, causal=True), N=4),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)
