"""Cells of routed feed-forward layers, which the tests of all implementations share."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import FFNBlocks, FFNLoRA, route_top_k, routed_ffn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: tokens M, D features, G blocks of E units, k chosen, R the rank of LoRA.

    `use` is how the router prefers blocks: "even"; "holes", where blocks 0 and 2 are never
    chosen; "one", where every token chooses the same.
    """

    name: str
    M: tuple[int, ...] = (40,)
    D: int = 24
    G: int = 4
    E: int = 16
    k: int = 2
    R: int = 0
    gated: bool = False
    bias: bool = True
    activation: str = "gelu"
    use: str = "even"
    masked: bool = False
    coefficient: str = "straight_through"
    dtype: str = "float32"

    def rng(self, seed):
        return np.random.default_rng([seed, zlib.crc32(self.name.encode())])

    def probabilities(self, seed=0):
        logits = self.rng(seed + 7).standard_normal((*self.M, self.G))
        prefer = np.zeros(self.G)
        if self.use == "holes":
            prefer[[0, 2]] = -100.0
        elif self.use == "one":
            prefer[1 : 1 + self.k] = 100.0
        return jax.nn.sigmoid(jnp.asarray(logits + prefer, jnp.float32))

    def mask(self):
        if not self.masked:
            return None
        return jnp.asarray(self.rng(5).random(self.M) < 0.6)

    def inputs(self, seed=0):
        """x, weights, LoRA or None, probabilities, and the cotangent of y."""
        rng, hidden = self.rng(seed), self.E * self.G
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
        matrix = lambda *shape: (draw(*shape) * shape[-2] ** -0.5).astype(self.dtype)
        optional = lambda on, array: array if on else None
        weights = FFNBlocks(
            w_up=matrix(self.G, self.D, self.E),
            w_down=(matrix(self.G, self.E, self.D) * (self.E / hidden) ** 0.5).astype(self.dtype),
            b_up=optional(self.bias, draw(self.G, self.E)),
            b_down=optional(self.bias, draw(self.D)),
            w_gate=optional(self.gated, matrix(self.G, self.D, self.E)),
            b_gate=optional(self.gated and self.bias, draw(self.G, self.E)),
        )
        lora = None
        if self.R:
            lora = FFNLoRA(
                up_a=matrix(self.D, self.R), up_b=matrix(self.G, self.R, self.E),
                down_a=matrix(self.G, self.E, self.R), down_b=matrix(self.R, self.D),
                gate_a=optional(self.gated, matrix(self.D, self.R)),
                gate_b=optional(self.gated, matrix(self.G, self.R, self.E)), scale=0.5,
            )  # fmt: skip
        return draw(*self.M, self.D), weights, lora, self.probabilities(seed), draw(*self.M, self.D)


CASES = (
    Case(name="plain"),
    Case(name="no_bias", bias=False, activation="gelu_exact"),
    Case(name="batch", M=(2, 3, 5), activation="relu"),
    Case(name="one_token", M=()),
    Case(name="top_1", k=1),
    Case(name="one_block", G=1, k=1),
    Case(name="many_blocks", G=12, k=3, M=(150,)),
    Case(name="holes", use="holes"),
    Case(name="one_favourite", use="one"),
    Case(name="gated_bias", gated=True, activation="gelu"),
    Case(name="lora", R=3),
    Case(name="lora_gated", R=4, gated=True, activation="silu", bias=False),
    Case(name="masked_batch_lora", masked=True, R=3, M=(3, 11)),
    Case(name="own_coefficients", coefficient="own", R=3, gated=True, activation="silu"),
    Case(name="spt_lora_masked", coefficient="spt", R=3, masked=True, M=(4, 9)),
    Case(name="spt_gated_lora", coefficient="spt", R=3, gated=True, activation="silu"),
    Case(name="long", M=(700,), D=16, E=8),  # several sizes of row tiles
    Case(name="bf16_gated_lora", dtype="bfloat16", R=8, gated=True, activation="silu", D=64, E=32),
    Case(name="bf16_spt_masked", dtype="bfloat16", coefficient="spt", masked=True),
    Case(name="f16_lora", dtype="float16", R=4, D=64, E=32),
)


def case(name):
    return next(c for c in CASES if c.name == name)


def chosen(*names):
    return pytest.mark.parametrize("c", [case(name) for name in names], ids=lambda c: c.name)


def run(c, x, weights, lora, probabilities, **options):
    coefficient = "spt" if c.coefficient == "own" else c.coefficient
    plan = route_top_k(probabilities, c.k, mask=c.mask(), coefficient=coefficient)
    if c.coefficient == "own":  # 2 p on the output: not 1, unlike the straight-through ones
        plan = dataclasses.replace(plan, scaled="output")
    return routed_ffn(x, weights, plan, lora=lora, activation=c.activation, **options)


def value_and_gradients(c, dtype, implementation, **options):
    """y and the gradients of x, weights, LoRA and probabilities under jit, from rounded inputs."""
    *arguments, probabilities, dy = c.inputs()
    arguments, dy = jax.tree.map(lambda leaf: leaf.astype(dtype), (arguments, dy))

    @jax.jit
    def both(arguments, dy):
        call = lambda *a: run(c, *a, implementation=implementation, **options)
        y, pull = jax.vjp(call, *arguments)
        return y, pull(dy)

    return both((*arguments, probabilities), dy)
