"""How a feed-forward layer in blocks is stored, and its LoRA.

The hidden units of a layer are cut into G blocks of E units (F = G * E); `[D, F]` becomes
`[G, D, E]` and `[F, D]` becomes `[G, E, D]`. R is the rank of LoRA.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FFNBlocks:
    """The weights of a feed-forward layer, cut into G blocks of E hidden units. A frozen pytree.

    `activation(x w_up + b_up) w_down + b_down`, or with a gate (SwiGLU and its kin)
    `(activation(x w_gate + b_gate) * (x w_up + b_up)) w_down + b_down`. `sparsax.split_ffn` makes
    it from dense matrices.

    Attributes:
        w_up: `[G, D, E]`.
        w_down: `[G, E, D]`.
        b_up: `[G, E]` or None.
        b_down: `[D]` or None, added once, not for every block.
        w_gate: `[G, D, E]` or None.
        b_gate: `[G, E]` or None.
    """

    w_up: Float[Array, "*L G D E"]
    w_down: Float[Array, "*L G E D"]
    b_up: Float[Array, "*L G E"] | None = None
    b_down: Float[Array, "*L D"] | None = None
    w_gate: Float[Array, "*L G D E"] | None = None
    b_gate: Float[Array, "*L G E"] | None = None

    @property
    def num_blocks(self) -> int:
        """G."""
        return self.w_up.shape[-3]

    @property
    def features(self) -> int:
        """D, of input and output."""
        return self.w_up.shape[-2]

    @property
    def hidden(self) -> int:
        """F = G * E, hidden units of all blocks."""
        return self.w_up.shape[-3] * self.w_up.shape[-1]

    def astype(self, dtype: typing.Any) -> "FFNBlocks":
        """The weights rounded to another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)

    def to_dense(self) -> dict[str, Array | None]:
        """The dense layer: `w_up [D, F]`, `w_down [F, D]`, biases; units block after block."""
        flat = lambda w: None if w is None else jnp.moveaxis(w, -3, -2).reshape(*w.shape[-2:-1], -1)
        row = lambda b: None if b is None else b.reshape(-1)
        return {
            "w_up": flat(self.w_up), "w_down": self.w_down.reshape(-1, self.features),
            "b_up": row(self.b_up), "b_down": self.b_down,
            "w_gate": flat(self.w_gate), "b_gate": row(self.b_gate),
        }  # fmt: skip

    def units(
        self, x: Float[Array, "*B D"], activation: Callable[[Array], Array]
    ) -> Float[Array, "*B G E"]:
        """All hidden units, float32: for calibration, where every block is looked at."""
        x = x.astype(jnp.float32)

        def product(w, b):
            y = jnp.einsum("...d,gde->...ge", x, w.astype(jnp.float32), precision=HIGHEST)
            return y if b is None else y + b.astype(jnp.float32)

        up = product(self.w_up, self.b_up)
        if self.w_gate is None:
            return activation(up)
        return activation(product(self.w_gate, self.b_gate)) * up

    def norms(
        self, x: Float[Array, "*B D"], activation: Callable[[Array], Array]
    ) -> Float[Array, "*B G"]:
        """The norm of each block's hidden units: how active it is."""
        return jnp.linalg.norm(self.units(x, activation), axis=-1)

    def merged(self, lora: "FFNLoRA | None") -> "FFNBlocks":
        """The weights with LoRA multiplied out and added, for a layer that is done training."""
        if lora is None:
            return self

        def add(name, spec):
            if (w := getattr(self, f"w_{name}")) is None:
                return None
            a, b = (getattr(lora, f"{name}_{x}").astype(jnp.float32) for x in "ab")
            change = lora.scale * jnp.einsum(spec, a, b, precision=HIGHEST)
            return (w.astype(jnp.float32) + change).astype(w.dtype)

        return dataclasses.replace(
            self, w_up=add("up", "dr,gre->gde"), w_gate=add("gate", "dr,gre->gde"),
            w_down=add("down", "ger,rd->ged"),
        )  # fmt: skip

    def flops(self, tokens: int, active: int) -> int:
        """Multiplications and additions of the matrices for tokens that go through k blocks."""
        matrices = 2 if self.w_gate is None else 3
        return 2 * tokens * active * matrices * self.features * self.w_up.shape[-1]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FFNLoRA:
    """Low-rank additions to the matrices of `FFNBlocks`. A frozen pytree.

    `w_up + scale * up_a up_b`, likewise the gate, and `w_down + scale * down_a down_b`. Never
    multiplied out: sums over blocks are taken in the R columns between the factors.

    Attributes:
        up_a: `[D, R]`.
        up_b: `[G, R, E]`.
        down_a: `[G, E, R]`.
        down_b: `[R, D]`.
        gate_a: `[D, R]`, or None for layers without a gate.
        gate_b: `[G, R, E]`, or None.
        scale: alpha / R.

    Source: Hu et al., "LoRA" (arXiv 2106.09685).
    """

    up_a: Float[Array, "*L D R"]
    up_b: Float[Array, "*L G R E"]
    down_a: Float[Array, "*L G E R"]
    down_b: Float[Array, "*L R D"]
    gate_a: Float[Array, "*L D R"] | None = None
    gate_b: Float[Array, "*L G R E"] | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @classmethod
    def init(cls, key: Array, blocks: FFNBlocks, rank: int, *, scale: float = 1.0) -> "FFNLoRA":
        """LoRA that starts as no change: random first factors, second factors of zeros.

        Raises:
            ValueError: the rank is not positive.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}.")
        count, width, unit = blocks.w_up.shape
        dtype = blocks.w_up.dtype
        keys = jax.random.split(key, 3)
        draw = lambda key, shape, inputs: (
            jax.random.normal(key, shape, jnp.float32) * inputs**-0.5
        ).astype(dtype)
        gated = blocks.w_gate is not None
        return cls(
            up_a=draw(keys[0], (width, rank), width), up_b=jnp.zeros((count, rank, unit), dtype),
            down_a=draw(keys[1], (count, unit, rank), count * unit),
            down_b=jnp.zeros((rank, width), dtype),
            gate_a=draw(keys[2], (width, rank), width) if gated else None,
            gate_b=jnp.zeros((count, rank, unit), dtype) if gated else None,
            scale=scale,
        )  # fmt: skip

    def astype(self, dtype: typing.Any) -> "FFNLoRA":
        """The factors rounded to another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)
