"""One Transformer block fine-tuned on this machine's GPU: all of it, LoRA, SPT; the paper's table.

    python benchmarks/spt_block_gpu.py

Forward, backward and Adam, bfloat16, ReLU (OPT's block), 16 sequences of 512. SPT is LoRA of rank
16, 2 of 4 blocks of the feed-forward layer, and an eighth of the keys. Attention is "materialised"
(what the paper's baselines had), "flash" (cuDNN; SPT then has the routed layer alone) or "top_l".
Milliseconds are medians over runs of queued steps. MiB are what a step holds at its peak by XLA's
buffer assignment: parameters, optimizer, input, output and temporaries. Routers and codebooks are
random: what is computed is the same.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from gpu import kernels, queued_milliseconds
from harness import save

import sparsax
from sparsax.nn import DecoderBlock, DecoderConfig, RouterParam
from sparsax.rules import LoRA, Routed, TopL

RANK = 16
PROJECTIONS = r"attention\.(query|key|value|out)"
LORA = LoRA(path=PROJECTIONS, rank=RANK)
ROUTED = Routed(path="ffn", num_blocks=4, active=2, tokens=0, lora_rank=RANK, frozen=True)
TUNED = nnx.Any(nnx.LoRAParam, RouterParam)


class Flash(nnx.Module):
    """Dense causal attention that stores no scores, with the projections of a layer."""

    def __init__(self, layer, implementation: str):
        self.query, self.key, self.value, self.out = layer.query, layer.key, layer.value, layer.out
        self.implementation = implementation

    def __call__(self, x, *, key_mask=None):
        """Attends within x."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        attend = jax.nn.dot_product_attention
        return self.out(attend(q, k, v, is_causal=True, implementation=self.implementation))


def ways(keep: int) -> dict[tuple[str, str], tuple[list, object]]:
    """Rules and what is trained, by way and kind of attention."""
    lora = [LoRA(path=rf"{PROJECTIONS}|ffn\.(up|down)", rank=RANK)]
    top_l = TopL(path="attention", keep=keep, sequences=0)
    dense = {"full": ([], nnx.Param), "LoRA": (lora, nnx.LoRAParam)}
    found = {(way, kind): dense[way] for way in dense for kind in ("materialised", "flash")}
    spt = {"flash": [LORA, ROUTED], "top_l": [LORA, ROUTED, top_l]}
    return found | {("SPT", kind): (rules, TUNED) for kind, rules in spt.items()}


def training_step(model, wrt):
    """A step as a pure function, and what it starts from."""
    graph, tuned, rest = nnx.split(model, wrt, ...)
    tx = optax.adam(1e-4)

    def step(tuned, state, rest, x, dy):
        def loss(tuned):
            return (nnx.merge(graph, tuned, rest)(x) * dy).sum(dtype=jnp.float32)

        updates, state = tx.update(jax.grad(loss)(tuned), state, tuned)
        return optax.apply_updates(tuned, updates), state

    return step, tuned, tx.init(tuned), rest


def measure(model, wrt, x, dy, calls: int) -> dict:
    """Time and memory of training steps, and their kernels."""
    step, tuned, state, rest = training_step(model, wrt)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tuned, state, rest, x, dy).compile()
    memory = compiled.memory_analysis()
    now = [tuned, state]

    def run():
        now[:] = compiled(*now, rest, x, dy)

    row = {
        "ms": queued_milliseconds(run, lambda: jax.block_until_ready(now), calls=calls),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(tuned)),
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }  # fmt: skip
    if jax.default_backend() == "gpu":
        row["kernels_ms"] = kernels(jax.jit(step), *now, rest, x, dy)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[1024, 2048, 2560, 4096, 5120])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--flash", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--name", default="spt_block_gpu", help="of the result")
    args, rows = parser.parse_args(), []
    print("    D  way   attention       ms     MiB    trained")
    for features in args.features:
        config = DecoderConfig.opt(
            vocab_size=1, length=args.length, features=features, hidden=4 * features, layers=1,
            num_heads=features // (128 if features >= 4096 else 64), dtype=jnp.bfloat16,
        )  # fmt: skip
        shape = 2, args.batch, args.length, features
        x, dy = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        for (way, kind), (rules, wrt) in ways(args.length // 8).items():
            model = DecoderBlock(config, rngs=nnx.Rngs(0))
            if rules:
                model, _ = sparsax.sparsify(model, rules)
            if kind == "flash":
                model.attention = Flash(model.attention, args.flash)
            half = lambda leaf: leaf.astype(jnp.bfloat16)
            nnx.update(model, jax.tree.map(half, nnx.state(model, nnx.Param)))
            row = {"features": features, "way": way, "attention": kind,
                   **measure(model, wrt, x, dy, args.calls)}  # fmt: skip
            rows.append(row)
            told = f"{row['ms']:7.2f} {row['bytes'] / 2**20:7.0f} {row['trained']:10,}"
            print(f"{features:5d}  {way:4s}  {kind:12s} {told}", flush=True)
            save(args.name, rows)  # what there is, should the run be stopped
    print(save(args.name, rows))


if __name__ == "__main__":
    main()
