r"""Longformer-large end to end on this machine's GPU: what sliced attention is worth to a model.

    python benchmarks/longformer_gpu.py
    python benchmarks/longformer_gpu.py --resume --peers huggingface sdpa sdpa_compiled
    python benchmarks/longformer_gpu.py --quick --implementation xla --dense xla \
        --peers block_mask dense                                                # without a GPU

Inference in bfloat16 with random weights: 24 layers of 1024 features, 16 heads, feed-forward layers
of 4096, window 256 to either side, 64 scattered global tokens drawn for every document.
Milliseconds of a forward pass, medians over runs of calls (ours: inside one jitted loop; PyTorch's:
queued, in a process of its own). Beside ours:

    block_mask              ours with attention over the blocks of 64 that hold a pair of the first
                            document, on our block-sparse kernel and without projections of its own
                            for global tokens: stands for DeepSpeed, whose kernels need another age
    dense                   ours with dense flash attention (cuDNN)
    sdpa, sdpa_compiled     PyTorch's dense encoder of the size, eager and torch.compile
    huggingface, .._compiled transformers' Longformer, eager and torch.compile
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's processes come later

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from compound_gpu import rounded
from flax import nnx
from resumed import Results, need
from timing import milliseconds, repeated

import sparsax
from sparsax.nn import Longformer, LongformerConfig, Pattern

OURS = ("ours", "block_mask", "dense")
TORCH = ("huggingface", "huggingface_compiled", "sdpa", "sdpa_compiled")
SHAPES = ["4096x1", "4096x4", "4096x8", "16384x1", "16384x2"]
SIZES = {"layers": 24, "features": 1024, "heads": 16, "hidden": 4096, "window": 256, "globals": 64}
SMALL = {"layers": 2, "features": 64, "heads": 2, "hidden": 128, "window": 32, "globals": 5}


class Dense(nnx.Module):
    """Stands for Longformer's attention: the same projections, every pair."""

    def __init__(self, layer: sparsax.nn.LongformerSelfAttention, attend):
        self.query, self.key, self.value, self.out = layer.query, layer.key, layer.value, layer.out
        self.window, self.attention = layer.window, attend

    def pattern(self, *_, **__):
        """The pairs: none need be told."""

    def attend(self, x, pattern):
        """As `LongformerSelfAttention.attend`."""
        return self.out(self.attention(self.query(x), self.key(x), self.value(x)))


class Rounded(Dense):
    """Stands for it with the pairs rounded to blocks."""

    def __init__(self, layer, attend, blocks: Pattern):
        super().__init__(layer, attend)
        self.blocks = blocks

    def pattern(self, *_, **__):
        """The blocks."""
        return self.blocks.get_value()

    def attend(self, x, pattern):
        """As `LongformerSelfAttention.attend`."""
        return self.out(self.attention(self.query(x), self.key(x), self.value(x), pattern))


def config_of(size: dict, length: int) -> LongformerConfig:
    """The sizes by their published names."""
    return LongformerConfig(
        vocab_size=50265, hidden_size=size["features"], intermediate_size=size["hidden"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        max_position_embeddings=length + 2, attention_window=2 * size["window"],
        type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip


def draw(size: dict, length: int, batch: int):
    """`(tokens, global_mask)`."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 50265, (batch, length))
    chosen = np.zeros(tokens.shape, bool)
    for document in chosen:
        document[rng.choice(length, size["globals"], replace=False)] = True
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(chosen)


def with_attention(kind: str, model: Longformer, size: dict, chosen, args) -> Longformer:
    """The model with that kind of attention, its weights shared."""
    model = nnx.merge(*nnx.split(model))
    if kind == "ours":
        return model
    if kind == "dense":
        attend = partial(jax.nn.dot_product_attention, implementation=args.dense)
        stand_in = partial(Dense, attend=attend)
    else:
        positions = np.flatnonzero(np.asarray(chosen[0]))[None]
        exact = sparsax.patterns.compound.longformer(
            chosen.shape[1], window=size["window"], positions=positions
        )
        attend = partial(sparsax.block_sparse_attention, implementation=args.implementation)
        stand_in = partial(Rounded, attend=attend, blocks=Pattern(rounded(exact)))  # of all layers
    for layer in model.layers:
        layer.attention = stand_in(layer.attention)
    return model


def time_model(kind: str, model: Longformer, size: dict, length: int, batch: int, args) -> dict:
    """Milliseconds and bytes of one of our models."""
    tokens, chosen = draw(size, length, batch)
    graph, state = nnx.split(with_attention(kind, model, size, chosen, args))
    run = lambda tokens, chosen, state: nnx.merge(graph, state)(tokens, global_mask=chosen)
    arguments = tokens, chosen, state
    calls = 2 if args.quick else max(2, min(20, 2**17 // (length * batch)))
    program = repeated(run, calls).lower(*arguments).compile()
    memory = program.memory_analysis()
    return {
        "forward_ms": milliseconds(program, *arguments, calls=calls),
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    }


def time_torch(peer: str, shapes: list[str], size: dict, results: Results) -> None:
    """Stores what `longformer_torch.py` says of the shapes, line by line."""
    model, _, compiled = peer.partition("_")
    command = [sys.executable, str(Path(__file__).with_name("longformer_torch.py")),
               "--model", model, "--shapes", *shapes, *["--compile"] * bool(compiled)]  # fmt: skip
    for name, value in size.items():
        command += [f"--{name}", str(value)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                key = found.pop("shape")
                results.add(begin, key, peer, found)
                show(results.rows[key], peer)
                begin = time.perf_counter()
    if process.returncode:
        print(f"{peer}: the process ended with {process.returncode}", flush=True)


def show(row: dict, part: str) -> None:
    nan, found = float("nan"), row[part]
    time, mine = found.get("forward_ms", nan), row.get("ours", {}).get("forward_ms", nan)
    # PyTorch's peak counts the parameters, too.
    own = found.get("bytes", nan) + found.get("parameter_bytes", nan)
    gib = found.get("peak_bytes", own) / 2**30
    told = found.get("error", f"{time:9.2f} ms, {time / mine:6.2f} x ours, {gib:6.2f} GiB")
    print(f"{row['key']:9s} {part:21s} {told[:150]} ({found['took']:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="lengthxbatch")
    peers = (*OURS[1:], *TORCH)
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep what the result has")
    parser.add_argument("--name", default="longformer_gpu", help="of the result")
    args = parser.parse_args()
    if set(args.peers) & set(TORCH):
        need("torch", *["transformers"] * any("huggingface" in peer for peer in args.peers))
    size, shapes = (SMALL, ["512x1", "512x2"]) if args.quick else (SIZES, args.shapes)
    results = Results(args.name + "_quick" * args.quick, resume=args.resume)
    model = Longformer(
        config_of(size, max(int(shape.split("x")[0]) for shape in shapes)),
        max_global=size["globals"], implementation=args.implementation, dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    for shape in shapes:
        length, batch = map(int, shape.split("x"))
        results.row(shape, length=length, batch=batch, **size)
        for kind in OURS:
            if kind == "ours" or kind in args.peers:
                measure = partial(time_model, kind, model, size, length, batch, args)
                results.measure(shape, kind, measure)
                show(results.rows[shape], kind)
    for peer in (peer for peer in TORCH if peer in args.peers):
        lacking = [shape for shape in shapes if results.lacks(shape, peer)]
        if lacking:
            time_torch(peer, lacking, size, results)
    results.end("ours")


if __name__ == "__main__":
    main()
