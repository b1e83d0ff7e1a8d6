"""Rules that replace dense layers by factored ones."""

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from sparsax.convert import Row
from sparsax.lowrank import TILES, Side, choose_tiles
from sparsax.nn import TSVDCommonLinear, TSVDLinear
from sparsax.nn.dense import Dense, read_linear
from sparsax.nn.tsvd import Mode
from sparsax.typing import Implementation

LINEAR = (nnx.Linear, nnx.LinearGeneral)
Factored = TSVDLinear | TSVDCommonLinear


class GramObserver(nnx.Module):
    """A dense layer that also sums `x.T @ x` of its inputs, in float32."""

    def __init__(self, linear: Dense):
        self.linear = linear
        kernel, _, rest = read_linear(linear)
        self.axes = len(rest["in_shape"])
        self.gram = nnx.Variable(jnp.zeros((kernel.shape[0], kernel.shape[0])))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, **options: typing.Any):
        """The layer's own output."""
        size = self.gram.shape[0]
        rows = x.reshape(-1, size).astype(jnp.float32)
        self.gram[...] += jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
        self.calls[...] += 1
        return self.linear(x, **options)


class _Linears:
    """What the rules for dense layers share."""

    if typing.TYPE_CHECKING:
        weighted: bool

    modules = LINEAR

    def observer(self, module: nnx.Module) -> nnx.Module | None:
        """One that sums the Gram matrix, when the rule is weighted."""
        if not self.weighted:
            return None
        assert isinstance(module, Dense)
        return GramObserver(module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSVD(_Linears):
    """Dense layers to `TSVDLinear`.

    Args:
        path: regular expression for the whole path of the layers.
        tile: for every layer, see `sparsax.tsvd`; "auto" lets `sparsax.choose_tiles` pick tile
            and rank of each layer, so that all of them together reach `ratio`.
        ratio: dense parameters over those kept; or `rank`, or `energy`, see `sparsax.tsvd`.
        rank: see `ratio`.
        energy: see `ratio`.
        tiles: sizes that "auto" tries.
        weighted: minimise the error of the outputs on calibration data, not that of the weights.
        rank_multiple: for "auto", see `sparsax.choose_tiles`.
        implementation: of the new layers.

    Raises:
        ValueError: "auto" without a ratio.
    """

    path: str = ".*"
    tile: int | tuple[int, int] | typing.Literal["auto"] | None = "auto"
    ratio: int | float | None = None
    rank: int | None = None
    energy: int | float | None = None
    tiles: tuple[int | None, ...] = TILES
    weighted: bool = False
    rank_multiple: int = 1
    implementation: Implementation | None = None

    def __post_init__(self):
        others = (self.rank, self.energy)
        if self.tile == "auto" and (self.ratio is None or others != (None, None)):
            raise ValueError(
                "tile='auto' spreads one budget: give ratio=, and neither rank nor energy; "
                f"got ratio={self.ratio}, rank={self.rank}, energy={self.energy}."
            )

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """See `sparsax.convert.Rule`."""
        grams = _grams(observers)
        how = {path: {"tile": self.tile} | self._kept() for path in found}
        if self.tile == "auto":
            assert self.ratio is not None
            kernels = {path: _kernel(module) for path, module in found.items()}
            choices = choose_tiles(
                kernels, self.ratio, tiles=self.tiles, grams=grams or None,
                rank_multiple=self.rank_multiple,
            )  # fmt: skip
            how = {path: {"tile": c.tile, "rank": c.rank} for path, c in choices.items()}
        made = {}
        for path, module in found.items():
            assert isinstance(module, Dense)
            if self.tile == "auto" and how[path]["rank"] is None:
                made[path] = module, _row(path, module, module, None)
                continue
            layer = TSVDLinear.from_linear(
                module, gram=grams.get(path), implementation=self.implementation, **how[path]
            )
            made[path] = layer, _row(path, module, layer, grams.get(path))
        return made

    def _kept(self) -> dict[str, typing.Any]:
        return {"rank": self.rank, "ratio": self.ratio, "energy": self.energy}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSVDCommon(_Linears):
    """Dense layers to `TSVDCommonLinear`, to fine-tune their common factors alone.

    Args:
        path: regular expression for the whole path of the layers.
        tile: see `sparsax.tsvd_common`.
        ratio: dense parameters over those kept; or `rank`.
        rank: see `ratio`.
        side: see `sparsax.tsvd_common`.
        mode: "compressed" or "residual", see `TSVDCommonLinear.from_linear`.
        weighted: minimise the error of the outputs on calibration data, for side="right".
        implementation: of the new layers.
    """

    path: str = ".*"
    tile: int = 128
    ratio: int | float | None = None
    rank: int | None = None
    side: Side = "right"
    mode: Mode = "compressed"
    weighted: bool = False
    implementation: Implementation | None = None

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """See `sparsax.convert.Rule`."""
        grams, made = _grams(observers), {}
        for path, module in found.items():
            assert isinstance(module, Dense)
            layer = TSVDCommonLinear.from_linear(
                module, tile=self.tile, rank=self.rank, ratio=self.ratio, side=self.side,
                mode=self.mode, gram=grams.get(path), implementation=self.implementation,
            )  # fmt: skip
            made[path] = layer, _row(path, module, layer, grams.get(path))
        return made


def _kernel(module: nnx.Module) -> jax.Array:
    assert isinstance(module, Dense)
    return read_linear(module)[0]


def _grams(observers: Mapping[str, nnx.Module]) -> dict[str, jax.Array]:
    grams = {}
    for path, observer in observers.items():
        assert isinstance(observer, GramObserver)
        if not int(observer.calls[...]):
            raise ValueError(f"calibrate must run every matched layer; {path!r} was never called.")
        grams[path] = observer.gram[...]
    return grams


def _row(path: str, dense: Dense, layer: Dense | Factored, gram: jax.Array | None) -> Row:
    kernel = _kernel(dense)
    before = {"parameters": kernel.size, "bytes": kernel.nbytes, "flops": 2 * kernel.size}
    after, detail, error = before, "kept dense", 0.0
    if isinstance(layer, Factored):
        factors = layer.factors
        after = {
            "parameters": factors.parameters(), "bytes": factors.bytes(),
            "flops": factors.flops(1),
        }  # fmt: skip
        tile = factors.tile if isinstance(factors.tile, tuple) else (factors.tile,)
        detail = f"tile {' x '.join(map(str, tile))}, rank {factors.rank}"
        error = float(factors.error(kernel, gram))
    if isinstance(layer, TSVDCommonLinear):
        detail += f", common {layer.side}"
        if layer.residual is not None:
            after = {name: value + before[name] for name, value in after.items()}
            detail, error = f"{detail}, residual", 0.0
    pairs: dict[str, typing.Any] = {name: (before[name], after[name]) for name in before}
    return Row(
        path=path, before=type(dense).__name__, after=type(layer).__name__, detail=detail,
        error=error, **pairs,
    )  # fmt: skip
