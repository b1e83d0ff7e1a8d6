"""What a task of the SPION comparison is: its numbers, its flags, and what a model is worth."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu import leave_products_to_cublas
from jax.tree_util import Partial

from sparsax.nn import SparseAttention, score_maps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The numbers of a task; each is a flag, `--batch-size 64`."""

    length: int
    block: int
    layers: int
    features: int
    heads: int
    batch_size: int
    learning_rate: float
    dropout: float
    probe_every: int
    tolerance: float = 0.15  # of the transition rule; next to nothing: at --dense-steps
    dense_steps: int  # at most
    steps: int  # after the transition
    steps_per_call: int = 50
    density: float  # of what may be listed, the forced band among it
    band: int = 1
    quantile: float  # of the paper
    paper_density: float
    cover: float = 0.9
    held_batches: int  # batches that a validation looks at; a test takes twice as many

    def changed_by(self, args: argparse.Namespace) -> "Size":
        """These numbers, but for those that flags gave."""
        flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{n: x for n, x in flags.items() if x is not None})

    def quick(self, **changes: Any) -> "Size":
        """The same model trained for seconds, on sequences of a few blocks that `changes` names."""
        return dataclasses.replace(
            self, probe_every=20, dense_steps=60, steps=40, steps_per_call=20, density=0.6,
            quantile=0.8, paper_density=0.3, held_batches=4, **changes,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model to be made, its loss, its data on the device, and what a model is worth."""

    name: str
    metric: str
    size: Size
    make: Callable[[int], nnx.Module]  # of a seed
    loss: Callable[..., Any]
    optimizer: Any
    batches: Callable[[int, int], Partial]  # of seed and steps
    measure: Callable[[nnx.Module, Any], jax.Array]  # of a batch, higher is better
    valid: Any  # arrays [batches, B, ...]
    test: list[Any]  # of the same shape as `valid`
    causal: bool = False
    padded: bool = False


def parse(
    description: str | None,
    add_own: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The flags of every script, and those that one adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the files")
    parser.add_argument("--out", type=Path, required=True, help="all that a run goes on from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="in this order; dense before oracle")
    parser.add_argument(
        "--minutes", type=float, default=600, help="end by then, to be gone on with"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, in OUT/quick")
    parser.add_argument("--dense", choices=["cudnn", "xla"], help="what dense attention runs")
    parser.add_argument("--no-peers", action="store_true", help="no table of time and memory")
    parser.add_argument("--beside", action="store_true",
                        help="of other tasks: take turns with them on the GPU")  # fmt: skip
    parser.add_argument("--no-bar", action="store_true", help="no progress bars")
    for field in dataclasses.fields(Size):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type)
    add_own(parser)
    args = parser.parse_args()
    if args.quick:
        args.out /= "quick"  # checkpoints of their own
    args.out.mkdir(parents=True, exist_ok=True)
    leave_products_to_cublas()  # or training waits while the next method's programs are tuned
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    # The small programs are many, and all together take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Kernels name the files that they come from: programs are found again from any folder.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    if args.dense is None:
        args.dense = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return args


def data_folder(args: argparse.Namespace) -> Path:
    """The folder of the files, for a task that has to be given one."""
    if args.data is None:
        raise SystemExit("--data FOLDER is needed")
    return args.data


def dtype() -> Any:
    """Of the computation: the kernels take 16 bits, a CPU has no use for them."""
    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


def configured(model: nnx.Module, pruned: str, dense: str) -> nnx.Module:
    """The model with these choices in every attention layer."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, SparseAttention):
            layer.pruned, layer.dense = pruned, dense
    return model


def one_cycle(peak: float, steps: int) -> Partial:
    """The rate climbs to its peak in 30 % of the steps, is back at 85 %, and ends near zero."""
    return Partial(_one_cycle, jnp.float32(peak), jnp.float32(steps))


def _one_cycle(peak, steps, step):
    x = step / steps  # jnp.interp would search its knots in a loop, every step
    up, down, end = 0.04 + 3.2 * x, 1 - 0.96 * (x - 0.3) / 0.55, 0.04 * (1 - x) / 0.15
    return peak * jnp.where(x < 0.3, up, jnp.where(x < 0.85, down, jnp.maximum(end, 4e-6)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_score(measure, graphdef, state, held):
    return jax.lax.map(lambda batch: measure(nnx.merge(graphdef, state), batch), held).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_loss(loss, graphdef, state, held):
    each = lambda batch: loss(nnx.merge(graphdef, state), batch, None)[0]
    return jax.lax.map(each, held).mean()


@functools.partial(jax.jit, static_argnums=(0, 3))
def head_maps(graphdef, state, tokens, block):
    """Pooled maps of every head, `[L, N, n, n]`."""
    return score_maps(nnx.merge(graphdef, state), tokens, per_head=True, pool=block)


def score(task: Task, model: nnx.Module, *parts: Any) -> float:
    """What the model is worth on held-out parts, higher is better."""
    graphdef, state = nnx.split(model)
    return float(np.mean([one_score(task.measure, graphdef, state, part) for part in parts]))
