"""The ways of `finetune_e2e_gpu.py`: rules, and what is trained."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from language import halve, load_model, use_flash

import sparsax
from sparsax.nn import CommonParam, RoutedFFN, RouterParam
from sparsax.rules import TSVD, LoRA, Routed, TopL, TSVDCommon

ATTENTION = r".*attention\.(query|key|value|out)"
LINEARS = rf"{ATTENTION}|.*ffn\.(up|gate|down)"
RANK, BLOCKS = 16, 4


WAYS = (
    "full", "lora", "lora-qv", "spt-2-8", "spt-2-4", "spt-3-8", "spt-3-4", "routed-2", "routed-3",
    "top-8", "top-4", "common-2", "common-4", "common-2-res", "common-4-res", "tsvd-2", "tsvd-4",
)  # fmt: skip


def factors(path: tuple, value: typing.Any) -> bool:
    """Selects the factors of TSVD layers."""
    return path[-1] in ("u", "v")


def rules_of(way: str, length: int, seed: int, args) -> tuple[list, typing.Any]:
    """`(rules, what is trained)`."""
    name, *numbers = way.split("-")
    lora = functools.partial(LoRA, rank=RANK, seed=seed)
    top_l = lambda part: TopL(path=r".*\.attention", keep=length // part, seed=seed, sequences=32)
    routed = lambda active: Routed(
        path=r".*\.ffn", num_blocks=BLOCKS, active=active, lora_rank=RANK, frozen=True,
        tokens=args.tokens, seed=seed,
    )  # fmt: skip
    tuned = nnx.Any(nnx.LoRAParam, RouterParam)
    if way == "full":
        return [], nnx.Param
    if way == "lora":
        return [lora(path=LINEARS)], nnx.LoRAParam
    if way == "lora-qv":
        path = r".*attention\.(query|value)"
        return [LoRA(path=path, rank=4, alpha=32.0, seed=seed)], nnx.LoRAParam
    if name == "spt":
        active, part = map(int, numbers)
        return [lora(path=ATTENTION), routed(active), top_l(part)], tuned
    if name == "routed":
        return [lora(path=ATTENTION), routed(int(numbers[0]))], tuned
    if name == "top":
        return [lora(path=LINEARS), top_l(int(numbers[0]))], tuned
    if name == "common":
        mode = "residual" if numbers[1:] else "compressed"
        rule = TSVDCommon(path=LINEARS, tile=args.common_tile, ratio=int(numbers[0]), mode=mode)
        return [rule], CommonParam
    rule = TSVD(path=LINEARS, tile=args.tile, ratio=int(numbers[0]), implementation=args.tsvd)
    return [rule], factors


@dataclasses.dataclass
class Parts:
    """A model taken apart: its graph, what is trained, what is frozen, and state like codebooks."""

    graph: typing.Any
    tuned: typing.Any
    frozen: typing.Any
    other: typing.Any


def convert(way: str, seed: int, args, calibration) -> tuple[Parts, int]:
    """The model of a way, ready to be trained, and its number of parameters."""
    rules, wrt = rules_of(way, args.length, seed, args)
    model = load_model(args.model, jnp.bfloat16)
    if rules:
        see = nnx.jit(lambda model, tokens: model(tokens))
        run = lambda model: see(model, calibration)
        model, _ = sparsax.sparsify(model, rules, calibrate=run)
    use_flash(model, args.flash)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RoutedFFN):
            module.implementation = args.routed
    halve(model, nnx.All(nnx.Param, nnx.Not(wrt)))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Parts(*nnx.split(model, wrt, nnx.Param, ...)), size
