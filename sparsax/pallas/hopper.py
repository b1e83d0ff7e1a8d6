"""The few idioms of a Hopper kernel that every kernel here shares.

Thread "wg" of a kernel is a warpgroup: teams of `COMPUTE` multiply, one as a rule, and the last one
only copies tiles to shared memory. Everything that GPU interpret mode cannot run the way the
hardware does is in `TensorCores`, and nowhere else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core
from jax.interpreters import batching, mlir

COMPUTE = 2  # warpgroups that multiply; a team of them shares tiles
REGISTERS = {1: (40, 232), 2: (24, 112)}  # by teams: of a thread that copies, of one that computes
WG_ROWS = 64  # rows of one of them
ROWS = COMPUTE * WG_ROWS  # of a team
SLAB = 8  # rows that copies of tiles move whole
ACC = plgpu.WGMMAAccumulatorRef
LOG2E = math.log2(math.e)
SHARED_BYTES = 226 * 1024  # a thread block's shared memory, less what barriers need
LOWEST = -1e30  # finite, so that exp2(-inf - LOWEST) is 0 where -inf - -inf would be NaN
MATRIX = plgpu.Layout.WGMMA
ROW, COL = MATRIX.reduce(1), MATRIX.reduce(0)  # a value per row, per column of a matrix


def multiprocessors() -> int:
    """Of the default GPU; of an H100 or H200 where there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def shared(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory laid out as matrix instructions and tile copies want it.

    Lines of 64 bytes where 128 do not divide the features, and for 256 features, whose tiles have
    fewer rows than a line of 128 bytes has elements.
    """
    lines = 128 if shape[-1] in (64, 128) else 64
    columns = lines // jnp.dtype(dtype).itemsize
    return tiled(shape, dtype, columns, lines)


def tiled(shape: tuple[int, ...], dtype, columns: int, lines: int) -> Any:
    """Shared memory in tiles of 8 x `columns`, swizzled over lines of so many bytes."""
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(lines)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def padded_rows(x: jax.Array) -> jax.Array:
    """With rows of zeros as copies of tiles want them: whole slabs, no fewer than a warpgroup's."""
    rows = x.shape[0]
    return jnp.pad(x, ((0, max(-rows % SLAB, WG_ROWS - rows)), (0, 0)))


def zeros(shape: tuple[int, ...], layout) -> jax.Array:
    """Float32 zeros in a layout."""
    return full(shape, 0.0, layout)


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A float32 value everywhere, in a layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def folded(join: Callable[..., jax.Array], x: jax.Array, least: int = 32) -> jax.Array:
    """Columns joined with those half a matrix away, until no more than `least` are left.

    The rest of a reduction over columns is then short: each of its steps waits for the one before.
    """
    while x.shape[1] > least:
        half = x.shape[1] // 2
        x = join(x[:, :half], x[:, half:])
    return x


def per_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per row, as wide as the matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


def per_col(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per column, as high as the matrix."""
    return lax.broadcast_in_dim(x, shape, [1])


def copying(wg, teams: int | None = None) -> Callable[[Callable[..., None]], None]:
    """Has the copying warpgroup run what this decorates; with teams, a warp of it for each of them.

    A warpgroup gathers its warps before every copy; one warp need not, and leaves more of the
    issue slots to the warpgroups that compute. It is told which team it copies for.
    """
    many = teams or 1

    def decorate(copy):
        @pl.when(wg == many * COMPUTE)
        def _():
            plgpu.set_max_registers(REGISTERS[many][0], action="decrease")
            of_warp = lambda warp: pl.when(warp < many)(lambda: copy(warp))
            copy() if teams is None else plgpu.warp_map(of_warp)

    return decorate


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that the copying warpgroup fills and the computing ones empty."""

    bars: tuple[Any, Any]  # barriers of filled and of emptied slots, one per slot each
    slots: int
    first: Any = 0  # slot, where several rings share an array

    @property
    def filled(self) -> Any:
        """Barriers that the copies into each slot arrive at."""
        return self.bars[0]

    @staticmethod
    def barriers(slots: int, copies: int, cluster: int = 1) -> tuple[Any, Any]:
        """The barriers of a ring whose slots take that many copies to fill.

        Where a cluster of thread blocks shares copies, all of them must have emptied a slot.
        """
        filled = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
        if cluster == 1:
            return filled, plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots)
        return filled, plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=COMPUTE, num_barriers=slots
        )

    def slot(self, step):
        """The slot that a step uses."""
        return self.first + lax.rem(step, jnp.int32(self.slots))

    def reserve(self, step) -> None:
        """Waits until the slot of this step may be overwritten."""

        @pl.when(step >= self.slots)
        def _():
            plgpu.barrier_wait(self.bars[1].at[self.slot(step)])

    def wait(self, step) -> None:
        """Waits until the slot of this step has arrived."""
        plgpu.barrier_wait(self.bars[0].at[self.slot(step)])

    def release(self, step) -> None:
        """Gives the slot of this step back."""
        plgpu.barrier_arrive(self.bars[1].at[self.slot(step)])

    def drain(self, steps) -> None:
        """Waits for the releases that no later step has waited for."""

        def last(step, _):
            plgpu.barrier_wait(self.bars[1].at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, last, None)


@dataclasses.dataclass(frozen=True)
class Turns:
    """Lets the computing warpgroups start their products in turn, so that they fall out of step.

    In step, both would wait for the tensor cores and then both for the exponentials; one behind
    the other, the products of one run beside the exponentials of the other ("ping-pong" in
    FlashAttention-3, section 3.1). Every warpgroup must take the same number of turns.
    """

    barriers: Any  # one per warpgroup of a team; None to let them run as they may
    wg: Any

    @staticmethod
    def barrier(wanted: bool) -> Any:
        """The barriers of the turns, or None."""
        return plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE) if wanted else None

    def open(self) -> None:
        """Gives the first turn to the first warpgroup."""
        if self.barriers is not None:
            pl.when(self.wg == 1)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))

    def take(self) -> None:
        """Waits for this warpgroup's turn."""
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[self.wg])

    def give(self) -> None:
        """Lets the other warpgroup start its products."""
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[1 - self.wg])

    def close(self) -> None:
        """Takes the turn that nobody is left to take."""
        if self.barriers is not None:
            pl.when(self.wg == 0)(lambda: plgpu.barrier_wait(self.barriers.at[0]))


@dataclasses.dataclass(frozen=True)
class TensorCores:
    """Matrix products of tiles in shared memory, asynchronous on the hardware.

    Interpret mode has neither left operands in registers nor stores to accumulators; there the
    products are plain dots that are done at once, which hides nothing but the overlap.
    """

    interpret: bool

    def start(
        self,
        products: list[tuple[Any, Any, Any]],
        then: Callable[..., Any],
        started: Callable[[], None] = lambda: None,
    ) -> Any:
        """Starts `acc + a @ b` for each `(acc or None, a, b)`, in order, then `started`, `then`.

        `then(*waits)` gets one function per product that waits for it *and those before it* and
        returns its value; its argument tells how many products were started since by others.
        a: shared memory or registers; b: shared memory.
        """
        if self.interpret:
            values = [_dot(*product) for product in products]
            started()
            return then(*(lambda since=0, value=value: value for value in values))

        def wait(number, acc, since=0):
            behind = len(products) - 1 - number + since
            return plgpu.wgmma_accumulator_load(acc, wait_n=behind)

        shapes = [(a.shape[0], b.shape[1]) for _, a, b in products]

        def run(*accs):
            for acc_ref, (acc, _, _) in zip(accs, products, strict=True):
                if acc is not None:
                    acc_ref[...] = acc
            for acc_ref, (_, a, b) in zip(accs, products, strict=True):
                plgpu.wgmma(acc_ref, a, b)
            started()
            return then(*(functools.partial(wait, *pair) for pair in enumerate(accs)))

        return pl.run_scoped(run, *(ACC(shape, jnp.float32) for shape in shapes))

    def sums(
        self,
        shape: tuple[int, int],
        count: int,
        steps: Any,
        operands: Callable[[Any], tuple[Any, list[Any]]],
        release: Callable[[Any], None],
    ) -> list[jax.Array]:
        """The sum of `a @ b` for each of `count` b, of `a, bs = operands(step)`; 0 of no steps.

        All are in shared memory. The products of one step are always in flight; `release(step)` is
        called once its own have been done.
        """

        def run(*accs):
            def step(i, _):
                a, bs = operands(i)
                for acc, b in zip(accs, bs, strict=True):
                    plgpu.wgmma(acc, a, b)
                plgpu.wgmma_wait(count)

                @pl.when(i > 0)
                def _():
                    self.before_release()
                    release(i - 1)

            jax.lax.fori_loop(0, steps, step, None)
            values = [acc[...] for acc in accs]

            @pl.when(steps > 0)
            def _():
                self.before_release()
                release(steps - 1)

            return values

        return pl.run_scoped(run, *(ACC(shape, jnp.float32) for _ in range(count)))

    def sum_beside(
        self,
        shape: tuple[int, int],
        steps: int,
        operands: Callable[[Any], tuple[Any, Any]],
        release: Callable[[Any], None],
        meanwhile: Callable[[], None],
    ) -> jax.Array:
        """The sum of `a @ b` over a known number of steps; `meanwhile` runs beside the first ones.

        Operands and `release` are those of `sums`. Two steps are in flight beside the one that is
        waited for, so a ring needs three slots: with two it would wait for itself.
        """
        ahead = min(2, steps)

        def give_back(i):
            self.before_release()
            release(i)

        def run(acc):
            for i in range(ahead):
                plgpu.wgmma(acc, *operands(i))
            meanwhile()

            def step(i, _):
                plgpu.wgmma(acc, *operands(i))
                plgpu.wgmma_wait(ahead)
                give_back(i - ahead)

            lax.fori_loop(ahead, steps, step, None)
            value = acc[...]
            for i in range(steps - ahead, steps):
                give_back(i)
            return value

        return pl.run_scoped(run, ACC(shape, jnp.float32))

    def release(self, ring: Ring, step: Any) -> None:
        """Gives back the slot of a step whose products are done."""
        self.before_release()
        ring.release(step)

    def before_release(self) -> None:
        """Orders generic reads of a slot, which only interpret mode makes, before its refill."""
        if self.interpret:
            plgpu.commit_smem()


def _dot(acc, a, b):
    a = a if isinstance(a, jax.Array) else a[...]
    value = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return value if acc is None else acc + value


def launch(
    kernel, name: str, thread_blocks: int, out_type, interpret, *, cluster: int = 1,
    teams: int | None = None, **scratch,
):  # fmt: skip
    """The kernel as a function of its operands, on `thread_blocks` along the axis "item".

    With a cluster, so many thread blocks each, along the axis "cluster". `teams`: as `copying` has
    it.
    """
    clusters = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}
    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(thread_blocks,),
        grid_names=("item",),
        num_threads=(teams or 1) * COMPUTE + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # To be safe, Pallas gathers the warps of a warpgroup around whatever touches shared
            # memory. It need not where one warp copies: what computes writes there what leaves, or
            # what it alone multiplies, and `wait_smem_to_gmem` before and `commit_smem` after
            # gather the warps; and what copies bring is read between two barriers, at the second of
            # which all threads arrive (in a cluster one warp does, for matrix products, which are
            # the whole warpgroup's, or after `commit_smem`). Four warps that copy would drift
            # apart, until one missed a barrier's phase.
            unsafe_no_auto_barriers=teams is not None,
        ),
        **clusters,
    )
    return run if teams is None else lambda *operands: run(*map(_unvaried.bind, operands))


# Inside `jax.shard_map` operands have a type that says over which axes of the mesh they vary, which
# `plgpu.warp_map` refuses in references; who calls a kernel says it of its outputs again.
_unvaried = core.Primitive("unvaried")
_unvaried.def_impl(lambda x: x)
_unvaried.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.mat)()))
mlir.register_lowering(_unvaried, lambda _, x: [x])
batching.defvectorized(_unvaried)
