"""The rule that lets attention keep each query's best keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from sparsax.convert import Row
from sparsax.nn import SparseAttention, TopLAttention
from sparsax.nn.projections import out_shape
from sparsax.nn.top_l import Select
from sparsax.quantise import Score
from sparsax.rules.observer import InputObserver, seen_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopL:
    r"""Dense attention to `TopLAttention` with the same projections.

    Goes together with `LoRA` on these projections, in either order.

    Args:
        path: regular expression for the whole path of the layers.
        keep: L, keys that a query keeps; the paper's choice is an eighth of the length.
        select: "tokens" or "blocks", see `TopLAttention`.
        score: "adc" or "match"; None is the layer's choice.
        block: tokens in a block, for select="blocks".
        voters: queries of a block that vote, for select="blocks".
        sequences: calibration sequences, of one length and without padding, that codebooks are
            fitted to; 0 leaves them random, for `TopLAttention.fit_codebooks`.
        modules: types of layers to convert: `SparseAttention`, or others that are called as it is
            and have `query`, `key`, `value` and `out` with the heads as an axis.
        causal: whether a token sees only itself and what came before; None reads the layer's.
        rotary: base of rotary positions; None reads the layer's, where it has such an attribute.
        seed: of the codebooks.

    Source: Gui et al., "SPT" (arXiv 2312.10365), section 4.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> config = sparsax.nn.DecoderConfig.llama(
        ...     vocab_size=64, length=32, features=16, hidden=64, num_heads=2, layers=2
        ... )
        >>> model = sparsax.nn.LanguageModel(config, rngs=nnx.Rngs(0))
        >>> rules = [
        ...     sparsax.rules.LoRA(path=r".*attention\.(query|value)", rank=2),
        ...     sparsax.rules.Routed(path=r".*\.ffn", lora_rank=2, tokens=0),
        ...     sparsax.rules.TopL(path=r".*\.attention", keep=8, sequences=2),
        ... ]
        >>> tokens = jnp.arange(64).reshape(2, 32)
        >>> spt, report = sparsax.sparsify(model, rules, calibrate=lambda m: m(tokens))
        >>> [row.detail for row in report.rows if row.after == "TopLAttention"]
        ['8 keys by adc', '8 keys by adc']
    """

    path: str = ".*"
    keep: int
    select: Select = "tokens"
    score: Score | None = None
    block: int = 64
    voters: int | None = None
    sequences: int = 8
    modules: tuple[type[nnx.Module], ...] = (SparseAttention,)
    causal: bool | None = None
    rotary: float | None = None
    seed: int = 0

    def observer(self, module: nnx.Module) -> nnx.Module | None:
        """One that keeps the inputs, when there is to be calibration."""
        return InputObserver(module, self.sequences, axes=2) if self.sequences else None

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """See `sparsax.convert.Rule`."""
        rngs, made = nnx.Rngs(self.seed), {}
        fit = nnx.jit(lambda layer, x, key: layer.fit_codebooks(x, key=key))
        for path, module in found.items():
            layer = self._layer(path, module, rngs)
            x = seen_inputs(path, observers)
            if x is not None:
                fit(layer, x, rngs.params())
            made[path] = layer, self._row(path, module, layer)
        return made

    def _layer(self, path: str, module: Any, rngs: nnx.Rngs) -> TopLAttention:
        if missing := [n for n in ("query", "key", "value", "out") if not hasattr(module, n)]:
            raise ValueError(
                f"{path!r} must have the projections query, key, value and out; "
                f"{type(module).__name__} has no {missing}."
            )
        causal = getattr(module, "causal", None) if self.causal is None else self.causal
        if causal is None:
            raise ValueError(f"give causal=, since {path!r} has no such attribute.")
        rotary = getattr(module, "rotary", None) if self.rotary is None else self.rotary
        return TopLAttention.from_attention(
            module, keep=self.keep, select=self.select, score=self.score, block=self.block,
            voters=self.voters, causal=causal, rotary=rotary,
            implementation=getattr(module, "implementation", None), rngs=rngs,
        )  # fmt: skip

    def _row(self, path: str, module: nnx.Module, layer: TopLAttention) -> Row:
        # Beside the projections, which stay as they are: centroids, and products with all of them.
        codebooks = layer.codebooks[...]
        (heads, features), centroids = out_shape(layer.query), codebooks.shape[2]
        flops = 2 * centroids * (heads + codebooks.shape[0]) * features
        what = "keys" if self.select == "tokens" else f"keys in blocks of {self.block}"
        return Row(
            path=path, before=type(module).__name__, after=type(layer).__name__,
            detail=f"{self.keep} {what} by {layer.score}", error=0.0, parameters=(0, 0),
            bytes=(0, codebooks.nbytes), flops=(0, flops),
        )  # fmt: skip
