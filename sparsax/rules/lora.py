"""The rule that puts LoRA beside dense layers."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from sparsax.convert import Row
from sparsax.nn import LoRALinear
from sparsax.nn.dense import Dense, read_linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Dense layers to `LoRALinear`, to fine-tune the added factors alone.

    Args:
        path: regular expression for the whole path of the layers.
        rank: of the factors.
        alpha: see `LoRALinear`.
        seed: of the factors' start; every layer has its own.

    Example:
        >>> import sparsax
        >>> from flax import nnx
        >>> model = sparsax.nn.Encoder(100, 16, rngs=nnx.Rngs(0))
        >>> rule = sparsax.rules.LoRA(path=r".*\.(query|value)", rank=4)
        >>> tuned, report = sparsax.sparsify(model, [rule])
        >>> sparsax.peft.count_parameters(tuned, nnx.LoRAParam)
        (trainable=2048, total=76544)
    """

    path: str = ".*"
    rank: int = 16
    alpha: float | None = None
    seed: int = 0

    modules = (nnx.Linear, nnx.LinearGeneral)

    def observer(self, module: nnx.Module) -> None:
        """None: nothing is calibrated."""

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """See `sparsax.convert.Rule`."""
        rngs, made = nnx.Rngs(self.seed), {}
        for path, module in found.items():
            assert isinstance(module, Dense)
            layer = LoRALinear(module, rank=self.rank, alpha=self.alpha, rngs=rngs)
            made[path] = layer, self._row(path, module)
        return made

    def _row(self, path: str, dense: Dense) -> Row:
        kernel = read_linear(dense)[0]
        added = self.rank * sum(kernel.shape)
        return Row(
            path=path, before=type(dense).__name__, after=LoRALinear.__name__, error=0.0,
            detail=f"rank {self.rank}, alpha {self.alpha or self.rank:g}",
            parameters=(kernel.size, kernel.size + added),
            bytes=(kernel.nbytes, kernel.nbytes + added * kernel.itemsize),
            flops=(2 * kernel.size, 2 * (kernel.size + added)),
        )  # fmt: skip
