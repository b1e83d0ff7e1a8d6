"""How a compressed matrix is stored: the factors of its tiles.

A matrix `[D, F]` (input features x output features) is cut into I x J tiles of A x C, and every
tile is the product of a factor `[A, R]` and a factor `[R, C]`. The axes are ordered so that both
steps of `x @ u @ v` are plain batched matmuls without moving a weight.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Side = typing.Literal["left", "right"]
HIGHEST = jax.lax.Precision.HIGHEST  # a GPU would otherwise round float32 to 11 bits


def _static() -> typing.Any:
    return dataclasses.field(metadata={"static": True})


class _Factors:
    """What both forms of factors answer alike."""

    if typing.TYPE_CHECKING:

        @property
        def in_features(self) -> int: ...
        @property
        def out_features(self) -> int: ...
        def to_dense(self) -> Float[Array, "D F"]: ...

    def parameters(self) -> int:
        """Numbers stored, padding included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self))

    def bytes(self) -> int:
        """Bytes stored, padding included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def ratio(self) -> float:
        """Compression: the dense matrix' parameters over those stored."""
        return self.in_features * self.out_features / self.parameters()

    def error(
        self, w: Float[Array, "D F"], gram: Float[Array, "D D"] | None = None
    ) -> Float[Array, ""]:
        """Relative error against `w`: `|w - uv| / |w|` in the Frobenius norm.

        With `gram = x.T @ x` it is the error of the outputs, `|x(w - uv)| / |xw|`.
        """
        w = w.astype(jnp.float32)
        difference = w - self.to_dense()
        return jnp.sqrt(energy(difference, gram) / energy(w, gram))


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TiledFactors(_Factors):
    """A matrix as I x J tiles, each with factors of its own (TSVD). A frozen pytree.

    `sparsax.tsvd` makes it and `sparsax.tsvd_matmul` multiplies by it.

    Attributes:
        u: left factors, `[I, A, J, R]`.
        v: right factors, `[J, I, R, C]`.
        pad_in: zero rows added below the matrix, so that A divides D + pad_in.
        pad_out: zero columns added at its right, so that C divides F + pad_out.

    Source: Li, Choi, Kwon, Ahn, "A Hardware-Friendly Tiled Singular-Value Decomposition-Based
    Matrix Multiplication for Transformer-Based Models" (IEEE CAL 22(2), 2023).

    Example:
        >>> import jax
        >>> import sparsax
        >>> w = jax.random.normal(jax.random.key(0), (96, 128))
        >>> factors = sparsax.tsvd(w, tile=32, ratio=2)
        >>> factors.tile, factors.rank, factors.ratio()
        ((32, 32), 8, 2.0)
        >>> factors.to_dense().shape
        (96, 128)
    """

    u: Float[Array, "*L I A J R"]
    v: Float[Array, "*L J I R C"]
    pad_in: int = _static()
    pad_out: int = _static()

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile (A, C)."""
        return self.u.shape[-3], self.v.shape[-1]

    @property
    def rank(self) -> int:
        """R, the same for every tile, padding included."""
        return self.u.shape[-1]

    @property
    def in_features(self) -> int:
        """D, rows of the dense matrix."""
        return self.u.shape[-4] * self.u.shape[-3] - self.pad_in

    @property
    def out_features(self) -> int:
        """F, columns of the dense matrix."""
        return self.v.shape[-4] * self.v.shape[-1] - self.pad_out

    def transpose(self) -> "TiledFactors":
        """The factors of the transposed matrix."""
        u, v = jnp.moveaxis(self.v, -1, -3), jnp.moveaxis(self.u, -3, -1)
        return TiledFactors(u, v, pad_in=self.pad_out, pad_out=self.pad_in)

    def flops(self, rows: int) -> int:
        """Multiplications and additions of `x @ u @ v` for `rows` rows of x."""
        return 2 * rows * self.parameters()

    def to_dense(self) -> Float[Array, "D F"]:
        """The matrix that the factors stand for, float32."""
        u, v = self.u.astype(jnp.float32), self.v.astype(jnp.float32)
        w = jnp.einsum("iajr,jirc->iajc", u, v, precision=HIGHEST)
        w = w.reshape(self.in_features + self.pad_in, self.out_features + self.pad_out)
        return w[: self.in_features, : self.out_features]

    def pad_rank(self, multiple: int) -> "TiledFactors":
        """The same matrix with R rounded up to a multiple, by zeros, for kernels that want it."""
        extra = -self.rank % multiple
        u = jnp.pad(self.u, [(0, 0)] * (self.u.ndim - 1) + [(0, extra)])
        v = jnp.pad(self.v, [(0, 0)] * (self.v.ndim - 2) + [(0, extra), (0, 0)])
        return dataclasses.replace(self, u=u, v=v)

    def astype(self, dtype: typing.Any) -> "TiledFactors":
        """The factors rounded to another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CommonFactors(_Factors):
    """A matrix whose tiles share one factor (TSVD-common). A frozen pytree.

    side="right": `w[:, tile j] = tiles[:, j] @ common`; tiles `[D, J, R]`, common `[R, C]`.
    side="left":  `w[tile i, :] = common @ tiles[i]`;    common `[A, R]`, tiles `[I, R, F]`.

    The other side needs no tiles: rows (or columns) of all tiles are simply stacked.

    Attributes:
        tiles: the factors of the tiles.
        common: the factor that they share.
        pad: zero columns (right) or rows (left) added so that the tile divides the matrix.
        side: where the common factor stands.

    Source: Li's thesis on TSVD (see `TiledFactors`), the form for fine-tuning.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w = jax.random.normal(jax.random.key(0), (96, 128))
        >>> factors = sparsax.tsvd_common(w, tile=32, ratio=4)
        >>> factors.tiles.shape, factors.common.shape
        ((96, 4, 7), (7, 32))
    """

    tiles: Float[Array, "..."]
    common: Float[Array, "*L a b"]
    pad: int = _static()
    side: Side = _static()  # noqa: RUF009 (a field, as the others)

    @property
    def tile(self) -> int:
        """C columns (right) or A rows (left) of a tile."""
        return self.common.shape[-1 if self.side == "right" else -2]

    @property
    def rank(self) -> int:
        """R, of every tile."""
        return self.common.shape[-2 if self.side == "right" else -1]

    @property
    def in_features(self) -> int:
        """D, rows of the dense matrix."""
        d, i, tile = self.tiles.shape[-3], self.tiles.shape[-3], self.tile
        return d if self.side == "right" else i * tile - self.pad

    @property
    def out_features(self) -> int:
        """F, columns of the dense matrix."""
        j, f, tile = self.tiles.shape[-2], self.tiles.shape[-1], self.tile
        return j * tile - self.pad if self.side == "right" else f

    def flops(self, rows: int) -> int:
        """Multiplications and additions of `x @ factors` for `rows` rows of x."""
        uses = self.tiles.shape[-2 if self.side == "right" else -3]  # the common factor, per row
        return 2 * rows * (self.tiles.size + uses * self.common.size)

    def to_dense(self) -> Float[Array, "D F"]:
        """The matrix that the factors stand for, float32."""
        tiles, common = self.tiles.astype(jnp.float32), self.common.astype(jnp.float32)
        if self.side == "right":
            w = jnp.einsum("djr,rc->djc", tiles, common, precision=HIGHEST)
            return w.reshape(self.in_features, -1)[:, : self.out_features]
        w = jnp.einsum("ar,irf->iaf", common, tiles, precision=HIGHEST)
        return w.reshape(-1, self.out_features)[: self.in_features]

    def pad_rank(self, multiple: int) -> "CommonFactors":
        """The same matrix with R rounded up to a multiple, by zeros, for kernels that want it.

        Where `common` is trained they stay zeros: their gradient is one of tiles that are zero.
        """
        extra = (0, -self.rank % multiple)
        of_tiles = self.tiles.ndim - 1 if self.side == "right" else self.tiles.ndim - 2
        of_common = self.common.ndim - (2 if self.side == "right" else 1)
        pad = lambda x, axis: jnp.pad(x, [extra if i == axis else (0, 0) for i in range(x.ndim)])
        return dataclasses.replace(
            self, tiles=pad(self.tiles, of_tiles), common=pad(self.common, of_common)
        )

    def astype(self, dtype: typing.Any) -> "CommonFactors":
        """The factors rounded to another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)


def energy(w: Float[Array, "D F"], gram: Float[Array, "D D"] | None) -> Float[Array, ""]:
    """The squared norm of `w`, or of `x @ w` for any x with that Gram matrix."""
    weighted = w if gram is None else jnp.matmul(gram, w, precision=HIGHEST)
    # Rounding may turn the energy of a vanishing difference negative.
    return jnp.maximum((weighted * w).sum(), 0.0)
