"""The rule that cuts feed-forward layers into routed blocks."""

import dataclasses
import typing
from collections.abc import Mapping

import jax
from flax import nnx

from sparsax.convert import Row
from sparsax.linear import Activation
from sparsax.nn import FeedForward, RoutedFFN
from sparsax.routing.plan import Coefficient
from sparsax.rules.observer import InputObserver, seen_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    r"""Feed-forward layers to `RoutedFFN`, cut from the weights they have.

    Args:
        path: regular expression for the whole path of the layers.
        num_blocks: G.
        active: blocks that every token passes through.
        lora_rank: R of LoRA beside every matrix; 0 is without.
        lora_alpha: the product counts `alpha / rank` times; rank when None.
        frozen: the blocks' weights get no gradient, and none is computed.
        recompute: see `sparsax.routed_ffn`; False keeps more for the backward pass, which is
            quicker.
        coefficient: see `sparsax.route_top_k`.
        tokens: calibration tokens that cluster units and fit the router; 0 cuts consecutive units
            and starts with a random router, without calibration.
        modules: types of layers to convert.
        up: attribute of a layer that holds its first dense layer.
        down: attribute of its second.
        gate: attribute of its gate; a layer that has None there, or nothing, is not gated.
        activation: between the layers; None reads the layer's attribute `activation`.
        seed: of clusters, routers and LoRA.

    Example:
        >>> import sparsax
        >>> from flax import nnx
        >>> config = sparsax.nn.DecoderConfig.opt(
        ...     vocab_size=64, length=16, features=16, hidden=64, num_heads=2, layers=2
        ... )
        >>> model = sparsax.nn.LanguageModel(config, rngs=nnx.Rngs(0))
        >>> rule = sparsax.rules.Routed(path=r".*\.ffn", num_blocks=4, active=2, tokens=0)
        >>> routed, report = sparsax.sparsify(model, [rule])
        >>> [row.detail for row in report.rows]
        ['2 of 4 blocks', '2 of 4 blocks']
    """

    path: str = ".*"
    num_blocks: int = 4
    active: int = 2
    lora_rank: int = 0
    lora_alpha: float | None = None
    frozen: bool = False
    recompute: bool = True
    coefficient: Coefficient = "gain"
    tokens: int = 4096
    modules: tuple[type[nnx.Module], ...] = (FeedForward,)
    up: str = "up"
    down: str = "down"
    gate: str = "gate"
    activation: Activation | None = None
    seed: int = 0

    def observer(self, module: nnx.Module) -> nnx.Module | None:
        """One that keeps the inputs, when there is to be calibration."""
        return InputObserver(module, self.tokens) if self.tokens else None

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """See `sparsax.convert.Rule`."""
        rngs, made = nnx.Rngs(self.seed), {}
        for path, module in found.items():
            up, down = (self._part(path, module, name) for name in (self.up, self.down))
            layer = RoutedFFN.from_dense(
                up, down, getattr(module, self.gate, None), num_blocks=self.num_blocks,
                active=self.active, activation=self._activation(path, module),
                calibration=seen_inputs(path, observers), lora_rank=self.lora_rank,
                lora_scale=self._scale(), frozen=self.frozen, recompute=self.recompute,
                coefficient=self.coefficient, rngs=rngs,
            )  # fmt: skip
            made[path] = layer, self._row(path, module, layer)
        return made

    def _part(self, path: str, module: nnx.Module, name: str) -> typing.Any:
        if not hasattr(module, name):
            raise ValueError(
                f"{path!r} must have the attributes {self.up!r} and {self.down!r}; "
                f"{type(module).__name__} has no {name!r}. Name them with up= and down=."
            )
        return getattr(module, name)

    def _activation(self, path: str, module: nnx.Module) -> Activation:
        activation = self.activation or getattr(module, "activation", None)
        if not isinstance(activation, str):
            raise ValueError(
                f"give activation=, since {path!r} does not name its own; got {activation}."
            )
        return typing.cast(Activation, activation)

    def _scale(self) -> float:
        return 1.0 if self.lora_alpha is None else self.lora_alpha / max(self.lora_rank, 1)

    def _row(self, path: str, module: nnx.Module, layer: RoutedFFN) -> Row:
        def numbers(arrays) -> tuple[int, int]:
            leaves = jax.tree.leaves(arrays)
            return sum(x.size for x in leaves), sum(x.nbytes for x in leaves)

        matrices = [x for x in jax.tree.leaves(layer.blocks) if x.ndim == 3]
        dense = 2 * sum(x.size for x in matrices)
        share = self.active / self.num_blocks  # of what has an axis of blocks
        factors = jax.tree.leaves(layer.lora)
        lora = 2 * sum(x.size * (share if x.ndim == 3 else 1) for x in factors)
        router = 2 * layer.router_kernel[...].size
        before, after = (numbers(nnx.state(m, nnx.Param)) for m in (module, layer))
        detail = f"{self.active} of {self.num_blocks} blocks"
        if self.lora_rank:
            detail += f", LoRA of rank {self.lora_rank}"
        return Row(
            path=path, before=type(module).__name__, after=type(layer).__name__, detail=detail,
            error=0.0, parameters=(before[0], after[0]), bytes=(before[1], after[1]),
            flops=(dense, int(dense * share + lora) + router),
        )  # fmt: skip
