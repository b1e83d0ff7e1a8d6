"""PyTorch's encoders of Longformer-large's size: one line of JSON for every shape, as it is there.

    python benchmarks/longformer_torch.py --model huggingface --shapes 4096x1 4096x4

`longformer_gpu.py` starts it, in its own process, whose peak of memory is PyTorch's alone; what
JAX took before stays with the parent, so that PyTorch has less than the whole GPU. bfloat16, random
weights, no gradients. `huggingface` is transformers' Longformer with global tokens drawn for every
document; `sdpa` a dense encoder with PyTorch's flash attention. With `--compile` every layer goes
through torch.compile, as is recommended for equal layers: one compilation serves them all.
"""

import argparse
import importlib.metadata
import json

import torch
from timing import queued_milliseconds
from torch import nn
from torch.nn import functional

ARGUMENTS = ("layers", "features", "heads", "hidden", "window", "globals")


class Layer(nn.Module):
    """Dense attention and a GELU feed-forward layer, each followed by a LayerNorm."""

    def __init__(self, features: int, heads: int, hidden: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(features, features) for _ in range(4)
        )
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.heads = heads

    def forward(self, x):
        """Maps `x [B, T, D]` to the same shape."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = (split(linear(x)) for linear in (self.query, self.key, self.value))
        o = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(o))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Dense(nn.Module):
    """Embeddings and dense layers."""

    def __init__(self, args, length: int, vocab: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab, args.features)
        self.positions = nn.Embedding(length, args.features)
        self.norm = nn.LayerNorm(args.features)
        layer = lambda: Layer(args.features, args.heads, args.hidden)
        self.layers = nn.ModuleList(layer() for _ in range(args.layers))

    def forward(self, tokens):
        """Features `[B, T, D]` of tokens `[B, T]`."""
        x = self.norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return x


def make(args, length: int, vocab: int):
    """`(model, its layers)`, on the GPU from the start."""
    with torch.device(args.device):
        if args.model == "sdpa":
            model = Dense(args, length, vocab)
            return model.to(torch.bfloat16).eval(), model.layers
        from transformers import LongformerConfig, LongformerModel

        config = LongformerConfig(
            vocab_size=vocab, hidden_size=args.features, intermediate_size=args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=args.heads,
            max_position_embeddings=length + 2, attention_window=[2 * args.window] * args.layers,
            type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        )  # fmt: skip
        model = LongformerModel(config, add_pooling_layer=False)
    return model.to(args.device, torch.bfloat16).eval(), model.encoder.layer


def call_of(model, args, length: int, batch: int, vocab: int):
    """A forward pass without arguments."""
    tokens = torch.randint(2, vocab, (batch, length), device=args.device)
    if args.model == "sdpa":
        return lambda: model(tokens)
    chosen = torch.zeros_like(tokens)
    for document in chosen:
        document[torch.randperm(length, device=args.device)[: args.globals]] = 1
    real = torch.ones_like(tokens)
    return lambda: model(tokens, attention_mask=real, global_attention_mask=chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["huggingface", "sdpa"], required=True)
    parser.add_argument("--shapes", nargs="+", required=True, help="lengthxbatch")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    for name, value in zip(ARGUMENTS, (24, 1024, 16, 4096, 256, 64), strict=True):
        parser.add_argument(f"--{name}", type=int, default=value)
    args, vocab = parser.parse_args(), 50265
    on_gpu = args.device == "cuda"
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    versions = {"torch": torch.__version__}
    if args.model == "huggingface":
        versions["transformers"] = importlib.metadata.version("transformers")
    model, layers = make(args, max(length for length, _ in shapes), vocab)
    if args.compile:
        # Past the limit layers would run eagerly, and silently.
        torch._dynamo.config.recompile_limit = 256
        for layer in layers:
            layer.compile(dynamic=False)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for length, batch in shapes:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found = {}
        with torch.no_grad():
            try:
                run = call_of(model, args, length, batch, vocab)
                found["forward_ms"] = queued_milliseconds(run, wait)
            except RuntimeError as error:  # out of memory, or what cannot be compiled
                found["error"] = f"{type(error).__name__}: {error}"[:500]
        if on_gpu:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found |= {"shape": f"{length}x{batch}", "versions": versions}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
