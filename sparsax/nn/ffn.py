"""A feed-forward layer in blocks, of which a router picks a few for every token."""

import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax import checks
from sparsax.ffn import routed_ffn
from sparsax.linear import ACTIVATIONS, Activation
from sparsax.nn.dense import Dense, make_linear, read_linear
from sparsax.routing import (
    FFNBlocks,
    FFNLoRA,
    RoutingPlan,
    balance_loss,
    co_activation,
    fit_router,
    route_top_k,
    split_ffn,
)
from sparsax.routing.plan import Coefficient
from sparsax.typing import ArrayLike, Implementation

BLOCKS = ("w_up", "w_down", "b_up", "b_down", "w_gate", "b_gate")
LORA = ("up_a", "up_b", "down_a", "down_b", "gate_a", "gate_b")


class TunedParam(nnx.Param):
    """What SPT fine-tunes: routers and LoRA. The weights of the blocks are plain parameters.

    `nnx.Optimizer(model, tx, wrt=TunedParam)` and `nnx.DiffState(0, TunedParam)` select it.
    """


class RouterParam(TunedParam):
    """A router's kernel or bias, or how much its probabilities count."""


class RoutedLoRAParam(TunedParam, nnx.LoRAParam):
    """A factor of LoRA; `nnx.LoRAParam` selects it as well."""


class ChoiceBias(nnx.Variable):
    """Added to the probabilities for the choice of blocks alone; balanced by `balance_step`."""


class Routing(nnx.Intermediate):
    """Holds what a watched layer recorded."""


class RoutingRecord(typing.NamedTuple):
    """What a layer's router did in one call.

    Attributes:
        probabilities: float32 `[*B, G]`.
        plan: the blocks of every token.
        balance_loss: of the call, differentiable, see `sparsax.routing.balance_loss`.
    """

    probabilities: Float[Array, "*B G"]
    plan: RoutingPlan
    balance_loss: Float[Array, ""]


class RoutedFFN(nnx.Module):
    """A feed-forward layer of G blocks, of which every token passes through `active`.

    The blocks' weights (`w_up`, `b_up`, `w_gate`, `b_gate`, `w_down`, `b_down`) are plain
    parameters, those of router and LoRA are `TunedParam`s. `active` is a plain attribute: set it
    (or call `set_active`) to warm up from G, where the layer is the dense one until a gain is
    trained.

    Args:
        blocks: the weights, see `sparsax.split_ffn`; or use `from_dense`.
        router: kernel `[D, G]` and bias `[G]`, or None for a random kernel.
        active: blocks of a token, 1 to G.
        activation: see `sparsax.routed_ffn`.
        lora: low-rank additions, or None.
        coefficient: see `sparsax.route_top_k`; the gain starts out as zeros.
        frozen: the blocks' weights get no gradient, and none is computed.
        recompute: see `sparsax.routed_ffn`; False keeps more for the backward pass, which is
            quicker. A plain attribute, too.
        dtype: of the computation; the promotion of input and weights when None. The router
            computes in float32.
        implementation: see `sparsax.routed_ffn`.
        rngs: stream of a random router.

    Raises:
        ValueError: shapes do not belong together, or there is neither a router nor rngs.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import RoutedFFN
        >>> up, down = nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))
        >>> layer = RoutedFFN.from_dense(up, down, num_blocks=4, active=2, rngs=nnx.Rngs(2))
        >>> layer(jnp.ones((2, 5, 8))).shape
        (2, 5, 8)
    """

    def __init__(
        self, blocks: FFNBlocks, router: tuple[Array, Array] | None = None, *, active: int,
        activation: Activation, lora: FFNLoRA | None = None,
        coefficient: Coefficient = "gain", frozen: bool = False, recompute: bool = True,
        dtype: typing.Any = None, implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):  # fmt: skip
        self.w_up, self.w_down = nnx.Param(blocks.w_up), nnx.Param(blocks.w_down)
        self.b_up, self.b_down, self.w_gate, self.b_gate = (
            _optional(nnx.Param, blocks, name) for name in BLOCKS[2:]
        )
        self.lora_up_a, self.lora_up_b, self.lora_down_a, self.lora_down_b = (
            _optional(RoutedLoRAParam, lora, name) for name in LORA[:4]
        )
        self.lora_gate_a, self.lora_gate_b = (
            _optional(RoutedLoRAParam, lora, name) for name in LORA[4:]
        )
        self.lora_scale = 1.0 if lora is None else lora.scale
        kernel, bias = _router(blocks, router, rngs)
        self.router_kernel, self.router_bias = RouterParam(kernel), RouterParam(bias)
        gain = RouterParam(jnp.zeros(blocks.num_blocks)) if coefficient == "gain" else None
        self.router_gain = nnx.data(gain)
        self.choice_bias = ChoiceBias(jnp.zeros(blocks.num_blocks))
        self.active = active
        self.activation: Activation = activation
        self.coefficient: Coefficient = coefficient
        self.frozen = frozen
        self.recompute = recompute
        self.dtype = dtype
        self.implementation: Implementation | None = implementation
        self.watched = False

    @classmethod
    def from_dense(
        cls, up: Dense, down: Dense, gate: Dense | None = None, *, num_blocks: int, active: int,
        activation: Activation = "gelu", calibration: Float[Array, "*B D"] | None = None,
        assignment: Int[ArrayLike, " F"] | None = None, lora_rank: int = 0,
        lora_scale: float = 1.0, rngs: nnx.Rngs, **options: typing.Any,
    ) -> "RoutedFFN":  # fmt: skip
        """The layer in blocks; with LoRA and all blocks active its output starts out unchanged.

        Args:
            up: the first dense layer, D to F.
            down: the second, F to D.
            gate: the third of a gated layer, `down(activation(gate(x)) * up(x))`.
            num_blocks: G, a divisor of F.
            active: blocks of a token.
            activation: between the layers.
            calibration: inputs of the layer, `[*, D]`, many more than D tokens. Units that they
                activate together share a block, and the router is fitted to predict the `active`
                blocks of largest activation norm (half of them when all are active).
            assignment: block of every hidden unit, see `sparsax.split_ffn`. None clusters by
                calibration inputs, or takes consecutive units without them.
            lora_rank: R of LoRA beside every matrix; 0 is without.
            lora_scale: alpha / R.
            rngs: stream of clusters, LoRA, and of the router without calibration.
            **options: see the class.

        Raises:
            ValueError: layers do not fit together, or compute in different dtypes.
        """
        checks.one_of("activation", activation, ACTIVATIONS)
        dense, dtype = _read(up, down, gate)
        activate = ACTIVATIONS[activation]
        x = None if calibration is None else calibration.reshape(-1, calibration.shape[-1])
        if assignment is None and x is not None:
            units = split_ffn(num_blocks=1, **dense).units(x, activate)[:, 0]
            assignment = co_activation(units, num_blocks, key=rngs.params())
        blocks = split_ffn(num_blocks=num_blocks, assignment=assignment, **dense)
        router = None
        if x is not None:
            # Warming up from all blocks, the router is there for later, when they are fewer.
            later = active if active < num_blocks else max(1, num_blocks // 2)
            fit = fit_router(x, blocks.norms(x, activate), later)
            router = fit.kernel, fit.bias
        lora = None
        if lora_rank:
            lora = FFNLoRA.init(rngs.params(), blocks, lora_rank, scale=lora_scale)
        return cls(
            blocks, router, active=active, activation=activation, lora=lora,
            **{"dtype": dtype, "rngs": rngs} | options,
        )  # fmt: skip

    @property
    def blocks(self) -> FFNBlocks:
        """The blocks' weights, without LoRA."""
        arrays: typing.Any = {name: _value(getattr(self, name)) for name in BLOCKS}
        return FFNBlocks(**arrays)

    @property
    def lora(self) -> FFNLoRA | None:
        """The low-rank additions."""
        if self.lora_up_a is None:
            return None
        arrays: dict[str, typing.Any] = {
            name: _value(getattr(self, f"lora_{name}")) for name in LORA
        }
        return FFNLoRA(**arrays, scale=self.lora_scale)

    def merge_lora(self) -> None:
        """Sums LoRA into the blocks' weights, in place: the same outputs, and nothing beside."""
        merged = self.blocks.merged(self.lora)
        for name in BLOCKS:
            if (variable := getattr(self, name)) is not None:
                variable.set_value(getattr(merged, name))
        for name in LORA:
            setattr(self, f"lora_{name}", nnx.data(None))

    def to_dense(self) -> tuple[Dense, Dense, Dense | None]:
        """`(up, down, gate)` with the same weights, LoRA merged: the layer with all its blocks.

        Every block counts once: the coefficients, which follow each token, are left out.
        """
        dense = self.blocks.merged(self.lora).to_dense()
        features, hidden = (self.blocks.features,), (self.blocks.hidden,)

        def linear(name, in_shape, out_shape):
            kernel, bias = dense[f"w_{name}"], dense[f"b_{name}"]
            assert kernel is not None
            return make_linear(kernel, bias, in_shape, out_shape, self.dtype)

        gate = None if self.w_gate is None else linear("gate", features, hidden)
        return linear("up", features, hidden), linear("down", hidden, features), gate

    def route(
        self, x: Float[Array, "*B D"], *, mask: Bool[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B G"], RoutingPlan]:
        """The router's probabilities, and the plan for these tokens."""
        kernel, bias = (v[...].astype(jnp.float32) for v in (self.router_kernel, self.router_bias))
        probabilities = jax.nn.sigmoid(x.astype(jnp.float32) @ kernel + bias)
        plan = route_top_k(
            probabilities, self.active, mask=mask, bias=self.choice_bias[...],
            coefficient=self.coefficient, gain=_value(self.router_gain),
        )  # fmt: skip
        return probabilities, plan

    def __call__(
        self, x: Float[Array, "*B D"], *, mask: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Maps `[..., D]` to the same shape; `mask` is False at padding, which gives 0."""
        probabilities, plan = self.route(x, mask=mask)
        if self.watched:
            loss = balance_loss(probabilities, plan.group_sizes, mask=mask)
            self.routing = Routing(RoutingRecord(probabilities, plan, loss))
        blocks, lora = self.blocks, self.lora
        dtype = self.dtype
        if dtype is None:
            dtype = jnp.result_type(x, *jax.tree.leaves(blocks))
        return routed_ffn(
            x.astype(dtype), blocks.astype(dtype), plan, activation=self.activation,
            lora=None if lora is None else lora.astype(dtype), frozen=self.frozen,
            recompute=self.recompute, implementation=self.implementation,
        )  # fmt: skip


def _optional(kind, arrays, name):
    array = None if arrays is None else getattr(arrays, name)
    return nnx.data(None if array is None else kind(array))


def _value(variable):
    return None if variable is None else variable[...]


def _router(blocks, router, rngs) -> tuple[Array, Array]:
    shape = (blocks.features, blocks.num_blocks)
    if router is None:
        if rngs is None:
            raise ValueError("give a router (kernel, bias), or rngs for a random one.")
        kernel = jax.random.normal(rngs.params(), shape) * shape[0] ** -0.5
        return kernel, jnp.zeros(shape[1])
    if router[0].shape != shape or router[1].shape != shape[1:]:
        raise ValueError(
            f"router must be a kernel {shape} and a bias {shape[1:]}; "
            f"got {tuple(router[0].shape)} and {tuple(router[1].shape)}."
        )
    return router


def _read(up: Dense, down: Dense, gate: Dense | None) -> tuple[dict[str, typing.Any], typing.Any]:
    """Matrices and biases by the names of `split_ffn`, and the dtype of the computation."""
    found: dict[str, typing.Any] = {}
    dtypes = []
    for name, linear in {"up": up, "down": down, "gate": gate}.items():
        if linear is None:
            continue
        found[f"w_{name}"], found[f"b_{name}"], rest = read_linear(linear)
        dtypes.append(rest["dtype"])
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise ValueError(f"the dense layers must compute in one dtype; got {dtypes}.")
    return found, dtypes[0]
