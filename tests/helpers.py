"""One list of attention cases, and how far an implementation may be from the reference."""

import dataclasses
import functools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsax


class Tolerance(NamedTuple):
    """Largest relative L2 error against the float32 reference on the same (rounded) inputs."""

    output: float
    lse: float
    gradient: float


# float32: 24-bit sums of a few hundred terms in another order, about 1e-6; ten times that.
# bfloat16 has 8 bits (half a unit is 2e-3) and rounds the probabilities and the output once each
# going forward; the gradients round probabilities, ds and the result, and ds is a difference of
# numbers that nearly cancel. float16 has 3 bits more, so its rounding is 8 times finer.
# The log-sum-exp never leaves float32: its logits are exact products summed in float32.
TOLERANCES = {
    "float32": Tolerance(output=1e-5, lse=1e-5, gradient=1e-5),
    "bfloat16": Tolerance(output=1e-2, lse=1e-5, gradient=2e-2),
    "float16": Tolerance(output=2e-3, lse=1e-5, gradient=4e-3),
}


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    pattern: sparsax.BlockPattern
    options: dict[str, Any]  # arrays and statics of the call besides `implementation`
    cotangents: tuple[jax.Array, jax.Array]  # of o and of lse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: B T S N K H as everywhere, P heads of the pattern.

    `blocks` says how the block mask is drawn: "random"; "holes", with an empty row and an empty
    column; "cross", a full row and a full column on an almost empty mask; "full".
    `padding` masks the tail of the keys, another length for every sample, none left in the last
    one if "all". `segments` cuts both sequences into three.
    """

    name: str
    B: int = 2
    T: int = 64
    S: int = 64
    N: int = 2
    K: int = 2
    H: int = 16
    block_q: int = 16
    block_kv: int = 16
    P: int = 1
    blocks: str = "random"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    padding: str | None = None
    segments: bool = False
    scale: float | None = None
    dtype: str = "float32"
    pruned: str = "drop"

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    def block_mask(self, rng: np.random.Generator) -> np.ndarray:
        shape = (self.P, -(-self.T // self.block_q), -(-self.S // self.block_kv))
        mask = rng.random(shape) < (0.1 if self.blocks == "cross" else 0.5)
        if self.blocks == "holes":
            mask[:, 1], mask[..., 2] = False, False
        elif self.blocks == "cross":
            mask[:, 1], mask[..., 2] = True, True
        elif self.blocks == "full":
            mask[:] = True
        return mask

    def pattern(self, seed: int = 0) -> sparsax.BlockPattern:
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        return sparsax.BlockPattern.from_block_mask(
            self.block_mask(rng), q_len=self.T, kv_len=self.S, block_q=self.block_q,
            block_kv=self.block_kv,
        )  # fmt: skip

    def inputs(self, seed: int = 0) -> Inputs:
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), 1])
        draw = lambda *shape, gain=1.0: jnp.asarray(gain * rng.standard_normal(shape), self.dtype)
        q = draw(self.B, self.T, self.N, self.H, gain=2.0)  # sharper than a flat softmax
        k, v = draw(self.B, self.S, self.K, self.H), draw(self.B, self.S, self.K, self.H)
        do = draw(*q.shape)
        dlse = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)
        options: dict[str, Any] = {"causal": self.causal, "window": self.window}
        options |= {"pruned": self.pruned, "scale": self.scale}
        if self.padding is not None:
            kept = np.linspace(self.S, 0 if self.padding == "all" else self.S // 3, self.B)
            options["key_mask"] = jnp.asarray(np.arange(self.S) < kept.astype(int)[:, None])
        if self.segments:
            cut = lambda length: jnp.asarray(
                np.sort(rng.integers(0, 3, (self.B, length)), axis=1), jnp.int32
            )
            q_ids = cut(self.T)
            options["segment_ids"] = q_ids if self.T == self.S else (q_ids, cut(self.S))
        return Inputs(q, k, v, self.pattern(seed), options, (do, dlse))


CASES = (
    Case(name="plain"),
    Case(name="one_block", T=16, S=16, blocks="full"),
    Case(name="full_pattern", blocks="full"),
    Case(name="blocks_32", T=128, S=128, block_q=32, block_kv=32, H=32),
    Case(name="blocks_64", B=1, T=256, S=256, block_q=64, block_kv=64, H=64),
    Case(name="blocks_16_64", T=96, S=192, block_q=16, block_kv=64),
    Case(name="blocks_64_32", T=128, S=96, block_q=64, block_kv=32, P=2),
    Case(name="many_rows", B=1, T=80 * 16, S=48, N=1, K=1),  # more rows than the widest step
    Case(name="longer_keys", T=48, S=112),
    Case(name="longer_queries", T=112, S=48),
    Case(name="ragged", T=71, S=71),
    Case(name="ragged_both_causal", T=75, S=53, block_kv=32, causal=True),
    Case(name="ragged_zero", T=71, S=57, P=2, pruned="zero"),
    Case(name="head_per_pattern", N=3, K=3, P=3, H=8),
    Case(name="gqa_shared", N=4, K=2),
    Case(name="gqa_per_kv_head", N=4, K=2, P=2, causal=True),
    Case(name="gqa_per_head", N=4, K=2, P=4, blocks="holes"),
    Case(name="gqa_pattern_of_two_kv_heads", N=8, K=4, P=2, H=8),
    Case(name="mqa", N=4, K=1),
    Case(name="mqa_per_head", N=4, K=1, P=4, pruned="zero"),
    Case(name="causal", causal=True),
    Case(name="causal_full", causal=True, blocks="full"),
    Case(name="causal_zero", causal=True, pruned="zero", P=2),
    Case(name="causal_longer_keys", T=48, S=96, causal=True, pruned="zero"),
    Case(name="window", window=(20, 9), blocks="full"),
    Case(name="window_left", window=(24, None)),
    Case(name="window_right_causal", window=(None, 8), causal=True),
    Case(name="window_own_key", window=(0, 0), blocks="full", block_kv=32),
    Case(name="window_zero", window=(20, 0), pruned="zero", T=71, S=71),
    Case(name="padding", padding="some"),
    Case(name="padding_all", padding="all", pruned="zero"),
    Case(name="segments", segments=True, blocks="full"),
    Case(name="segments_pair", T=48, S=80, segments=True, N=4),
    Case(name="segments_padding_causal", segments=True, padding="some", causal=True, T=70, S=70),
    Case(name="segments_zero", segments=True, padding="some", pruned="zero", P=2),
    Case(name="holes", blocks="holes"),
    Case(name="holes_zero", blocks="holes", pruned="zero"),
    Case(name="cross", blocks="cross", T=128, S=128, P=2),
    Case(name="cross_zero", blocks="cross", T=128, S=128, pruned="zero"),
    Case(name="scale", scale=0.7),
    Case(name="bf16", dtype="bfloat16", T=128, S=128, block_q=32, block_kv=32),
    Case(name="bf16_gqa_causal", dtype="bfloat16", N=4, K=2, P=4, causal=True, H=32),
    Case(name="bf16_zero", dtype="bfloat16", pruned="zero", T=71, S=71),
    Case(name="bf16_padding", dtype="bfloat16", padding="some", blocks="holes"),
    Case(name="f16", dtype="float16", T=128, S=128, block_q=32, block_kv=32),
    Case(name="f16_zero", dtype="float16", N=4, K=2, causal=True, pruned="zero"),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)


def assert_near(got, want, tolerance: float, name: str, least: float = 1e-30) -> None:
    """Relative L2 error within the tolerance; infinities must sit at the same places.

    `least`: the norm below which what is wanted is a rest of terms that cancel.
    """
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, name
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=name)
    got, want = (np.where(np.isneginf(x), 0.0, x) for x in (got, want))
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), least)
    assert error <= tolerance, f"{name}: relative L2 error {error:.2e} > {tolerance:.0e}"


def with_biases[M: nnx.Module](model: M) -> M:
    """The model with a random number in every bias, changed in place.

    New layers have biases of zero, which show neither that one was left out nor that two were
    exchanged.
    """
    rng, state = np.random.default_rng(0), nnx.to_flat_state(nnx.state(model, nnx.Param))
    draw = lambda old: old.replace(jnp.asarray(rng.standard_normal(old.shape), old.dtype))
    drawn = [(path, draw(old)) for path, old in state if path[-1] == "bias"]
    assert drawn, "the model has no bias"
    nnx.update(model, nnx.from_flat_state(drawn))
    return model


def assert_gradients_near(got: nnx.State, want: nnx.State, tolerance: float) -> None:
    """Gradients of a model with attention: near for every parameter, and of none zero.

    But for biases of keys: they shift all logits of a row alike, and theirs is a rest of rounding.
    """
    found = nnx.to_flat_state(got)
    for (path, a), (_, b) in zip(found, nnx.to_flat_state(want), strict=True):
        name, a, b = ".".join(map(str, path)), a[...], b[...]
        if path[-2] in ("key", "key_global") and path[-1] == "bias":
            assert float(jnp.linalg.norm(a)) < 1e-4, name
            continue
        assert float(jnp.linalg.norm(b)) > 1e-4, name
        assert_near(a, b, tolerance, name)


def tsvd_kernels(text: str) -> set[str]:
    """The names of the kernels of factored matrices in a lowered program."""
    return set(re.findall(r"tsvd_(\w+?)_mosaic_gpu", text))


def launched(text: str) -> int:
    """Kernels that a lowered program launches; those in the body of a loop count once.

    Equal calls of a kernel may share a function, which stands in the program once.
    """
    parts = re.split(r"\n  func\.func \w+ @", text)[1:]
    bodies = {part.split("(", 1)[0]: part for part in parts}

    @functools.cache
    def of(name: str) -> int:
        called = re.findall(r"\bcall @([\w.]+)", bodies[name])
        own = bodies[name].count("stablehlo.custom_call @mosaic_gpu")
        return own + sum(of(x) for x in called if x in bodies)

    return of("main")
