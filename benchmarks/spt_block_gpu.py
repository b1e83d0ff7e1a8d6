r"""One Transformer block fine-tuned on this machine's GPU: all of it, LoRA, SPT; the paper's table.

    python benchmarks/spt_block_gpu.py                    # the paper's 16 sequences of 512
    python benchmarks/spt_block_gpu.py --features 2048 --lengths 2048 8192 32768 \
        --kinds flash blocks --name spt_block_long_gpu    # where sparse attention pays

Forward, backward and Adam of a block amid others, whose output and input's gradient are wanted;
bfloat16, ReLU (OPT's block), 8,192 tokens or one sequence. SPT is LoRA of rank 16, 2 of 4 blocks of
the feed-forward layer, and an eighth of the keys. Attention is "materialised" (what the paper's
baselines had), "flash" (cuDNN; SPT then has the routed layer alone), "top_l" (exact, by tables),
"match" (exact, by equal codes, which has kernels; the paper's) or "blocks" (blocks of 128 by vote
of equal codes, for speed). Milliseconds are medians over runs of queued steps. MiB are what a step
holds at its peak by XLA's buffer assignment: parameters, optimizer, input, output and temporaries.
Routers and codebooks are random: what is computed is the same, but for "blocks", whose votes spread
as those of random keys do. --keep-hidden measures "SPT, kept" beside "SPT": the routed layer with
`recompute=False`.
"""

import argparse
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from language import halve, use_flash
from resumed import Rows
from timing import kernels, queued_milliseconds

import sparsax
from sparsax.nn import DecoderBlock, DecoderConfig, RoutedFFN, RouterParam
from sparsax.rules import LoRA, Routed, TopL

RANK = 16
PROJECTIONS = r"attention\.(query|key|value|out)"
LORA = LoRA(path=PROJECTIONS, rank=RANK)
ROUTED = Routed(path="ffn", num_blocks=4, active=2, tokens=0, lora_rank=RANK, frozen=True)
TUNED = nnx.Any(nnx.LoRAParam, RouterParam)
TOKENS = 8192  # of a batch
KINDS = ("materialised", "flash", "top_l", "match", "blocks")  # of attention


def ways(keep: int, keep_hidden: bool) -> dict[tuple[str, str], tuple[list, object]]:
    """Rules and what is trained, by way and kind of attention."""
    lora = [LoRA(path=rf"{PROJECTIONS}|ffn\.(up|down)", rank=RANK)]
    top_l = TopL(path="attention", keep=keep, sequences=0)
    match = dataclasses.replace(top_l, score="match")
    blocks = dataclasses.replace(match, select="blocks", block=128)
    dense = {"full": ([], nnx.Param), "LoRA": (lora, nnx.LoRAParam)}
    found = {(way, kind): dense[way] for way in dense for kind in ("materialised", "flash")}
    spt = {"flash": [], "top_l": [top_l], "match": [match], "blocks": [blocks]}
    found |= {("SPT", kind): ([LORA, ROUTED, *rules], TUNED) for kind, rules in spt.items()}
    if keep_hidden:
        kept = dataclasses.replace(ROUTED, recompute=False)
        of = {kind: spt[kind] for kind in ("flash", "blocks")}
        found |= {("SPT, kept", kind): ([LORA, kept, *rules], TUNED) for kind, rules in of.items()}
    return found


def training_step(model, wrt):
    """A step as a pure function, and what it starts from."""
    graph, tuned, rest = nnx.split(model, wrt, ...)
    tx = optax.adam(1e-4)

    def step(tuned, state, rest, x, dy):
        # As a block amid others: the output is wanted, which dy would not need, and dx.
        y, pull = jax.vjp(lambda tuned, x: nnx.merge(graph, tuned, rest)(x), tuned, x)
        gradients, dx = pull(dy)
        updates, state = tx.update(gradients, state, tuned)
        return optax.apply_updates(tuned, updates), state, y, dx

    return step, tuned, tx.init(tuned), rest


def start(pool: ThreadPoolExecutor, model, wrt, x, dy):
    """`measure`, whose step is compiled in the pool: XLA tunes small products for long."""
    step, tuned, state, rest = training_step(model, wrt)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(tuned, state, rest, x, dy)
    return partial(measure, pool.submit(lowered.compile), tuned, state, rest, x, dy)


def measure(future: Future, tuned, state, rest, x, dy) -> dict:
    """Time and memory of training steps, and their kernels."""
    compiled = future.result()
    memory, now = compiled.memory_analysis(), [tuned, state]

    def run():
        *now[:], y, dx = compiled(*now, rest, x, dy)
        return now, y, dx

    row = {
        "ms": queued_milliseconds(run, lambda: jax.block_until_ready(now)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(now[0])),
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }  # fmt: skip
    if jax.default_backend() == "gpu":
        row["kernels_ms"] = kernels(run)
    return row


def block(features: int, length: int, rules: list, kind: str, args) -> nnx.Module:
    """The block of a way, in bfloat16."""
    config = DecoderConfig.opt(
        vocab_size=1, length=length, features=features, hidden=4 * features, layers=1,
        num_heads=features // (128 if features >= 4096 else 64), dtype=jnp.bfloat16,
    )  # fmt: skip
    model = DecoderBlock(config, rngs=nnx.Rngs(0))
    if rules:
        model, _ = sparsax.sparsify(model, rules)
    if kind == "flash":
        use_flash(model, args.flash)
    if isinstance(model.ffn, RoutedFFN):
        model.ffn.implementation = args.routed
    halve(model)
    return model


def prepare(args, done: Rows, features: int, length: int) -> dict:
    """What measures the rows that are missing, by way and kind: all is compiled first."""
    shape = 2, 1 if args.quick else max(1, TOKENS // length), length, features
    x, dy = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    models = {}
    for (way, kind), (rules, wrt) in ways(length // 8, args.keep_hidden).items():
        key = {"features": features, "length": length, "way": way, "attention": kind}
        if kind in args.kinds and not done.has(**key):
            models[way, kind] = key, block(features, length, rules, kind, args), wrt
    # Nothing else runs on the GPU while XLA tunes.
    jax.block_until_ready([nnx.state(model) for _, model, _ in models.values()])
    with ThreadPoolExecutor() as pool:
        begin = lambda key, model, wrt: (key, start(pool, model, wrt, x, dy))
        return {name: begin(*parts) for name, parts in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--features", type=int, nargs="+", default=[1024, 2048, 2560, 4096, 5120])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:4]))
    parser.add_argument("--flash", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--routed", choices=["xla", "pallas"], help="of the routed FFN")
    parser.add_argument("--keep-hidden", action="store_true", help="also with recompute=False")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--name", default="spt_block_gpu", help="of the result")
    parser.add_argument("--quick", action="store_true", help="a tiny block, anywhere")
    args = parser.parse_args()
    if args.quick:
        quick = {"features": [128], "lengths": [256], "flash": "xla", "kinds": KINDS,
                 "name": args.name + "_quick"}  # fmt: skip
        vars(args).update(quick)
    done = Rows(args.name, ("features", "length", "way", "attention"), resume=args.resume)
    print("    D length  way        attention       ms     MiB    trained       s")
    for features in args.features:
        for length in args.lengths:
            steps = prepare(args, done, features, length)
            for way, kind in list(steps):
                begin = time.perf_counter()
                key, step = steps.pop((way, kind))  # and with it what it trains
                row = done.add(begin, key | step())
                told = f"{row['ms']:7.2f} {row['bytes'] / 2**20:7.0f} {row['trained']:10,}"
                print(f"{features:5d} {length:6d}  {way:9s}  {kind:12s} {told} {row['took']:7.1f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
