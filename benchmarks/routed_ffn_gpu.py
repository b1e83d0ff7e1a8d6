"""The routed feed-forward layer on this machine's GPU against the dense one, in one run.

    python benchmarks/routed_ffn_gpu.py           # --torch: PyTorch's grouped products as well

bfloat16, a random router: choosing and sorting are inside what is timed. "trained" takes gradients
of tokens, matrices and router; "lora" of tokens, LoRA (beside every matrix, of the dense layer too)
and router, the matrices being frozen. Milliseconds are medians over runs of calls inside one
program (of PyTorch: of queued calls); TFLOP/s count the products of chosen blocks; "x" is the dense
time over the routed one. With k of G blocks and nothing else to do it would be G / k forward, and
less with both passes, as the routed layer computes its hidden units again, without a gate one
product more: 6 G / 7 k trained, 4 G / 5 k with LoRA. --keep-hidden also times `recompute=False`, in
rows of its own beside the same peers: with no product more, for more bytes. Bytes are what XLA
reserves beside the arguments. Values and gradients are compared with those of the portable
implementation first.
"""

import argparse
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
from harness import save
from timing import kernels, milliseconds, queued_milliseconds, repeated

import sparsax
from sparsax.linear import ACTIVATIONS


def low(x, a, b):
    return (x @ a) @ b


def dense(x, tuned, fixed, *, activation, **_):
    """The layer with all its units, through cuBLAS."""
    w, lora = (tuned | fixed)["dense"], tuned.get("dense_lora")
    product = lambda x, name: x @ w[name] + (0 if lora is None else low(x, *lora[name]))
    act, up = ACTIVATIONS[activation], product(x, "up")
    return product(act(product(x, "gate")) * up if "gate" in w else act(up), "down")


def routed(x, tuned, fixed, *, activation, active, **options):
    """Router, choice and the chosen blocks."""
    given = tuned | fixed
    p = jax.nn.sigmoid(jnp.matmul(x, given["router"], preferred_element_type=jnp.float32))
    return sparsax.routed_ffn(
        x, given["blocks"], sparsax.route_top_k(p, active), activation=activation,
        lora=given.get("lora"), frozen="blocks" in fixed, **options,
    )  # fmt: skip


def parameters(args, features: int, hidden: int, blocks: int) -> dict[str, dict]:
    """What is trained and what is fixed, for each way to train."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    draw = lambda *shape: (
        jax.random.normal(next(keys), shape, jnp.float32) * shape[-2] ** -0.5
    ).astype(jnp.bfloat16)
    shapes = {"up": (features, hidden), "down": (hidden, features)}
    shapes |= {"gate": (features, hidden)} if args.gated else {}
    matrices = {name: draw(*shape) for name, shape in shapes.items()}
    cut = sparsax.split_ffn(
        matrices["up"], matrices["down"], blocks, w_gate=matrices.get("gate")
    )  # fmt: skip
    lora = {n: (draw(i, args.rank), draw(args.rank, o)) for n, (i, o) in shapes.items()}
    split = sparsax.FFNLoRA.init(next(keys), cut, args.rank)
    split = jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), split)  # nothing of it is 0
    layer, more = {"dense": matrices, "blocks": cut}, {"dense_lora": lora, "lora": split}
    router = {"router": draw(features, blocks)}
    return {"trained": (layer | router, {}), "lora": (more | router, layer)}


def both(layer):
    """Forward and backward as one function of `(x, dy, tuned, fixed)`."""

    def run(x, dy, tuned, fixed):
        y, pull = jax.vjp(lambda x, tuned: layer(x, tuned, fixed), x, tuned)
        return y, pull(dy)

    return run


ONLY = {"dense": ("dense", "dense_lora"), "routed": ("blocks", "lora", "router")}


def of(layer: str, given: dict) -> dict:
    """What one of the two layers uses."""
    return {name: value for name, value in given.items() if name in ONLY[layer]}


def check(got, want) -> float:
    """The largest relative L2 error of y and gradients; more than rounding is an error."""
    norm = lambda a: jnp.linalg.norm(a.astype(jnp.float32).reshape(-1))
    worst = max(
        float(norm(a.astype(jnp.float32) - b) / norm(b))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )
    if not worst < 2e-2:
        raise SystemExit(f"the routed layer is wrong: relative error {worst}")
    return worst


@dataclasses.dataclass(frozen=True)
class Programs:
    """A layer with its arguments, compiled: a call of both passes, and loops of calls."""

    forward_args: tuple
    both_args: tuple
    calls: int  # of a loop
    once: Future
    forward: Future
    both: Future

    @classmethod
    def start(cls, pool: ThreadPoolExecutor, layer, x, dy, tuned, fixed, calls: int) -> "Programs":
        """Traces them here and compiles them in the pool: XLA tunes small products for long."""
        forward_args, both_args = (x, tuned, fixed), (x, dy, tuned, fixed)
        compile_ = lambda function, args: pool.submit(function.lower(*args).compile)
        return cls(
            forward_args, both_args, calls,
            compile_(jax.jit(both(layer)), both_args),
            compile_(repeated(layer, calls), forward_args),
            compile_(repeated(both(layer), calls), both_args),
        )  # fmt: skip

    def results(self):
        """Of both passes."""
        return self.once.result()(*self.both_args)

    def time(self) -> dict:
        """Milliseconds of forward alone and of both passes, bytes of both."""
        memory, calls = self.once.result().memory_analysis(), self.calls
        return {
            "forward_ms": milliseconds(self.forward.result(), *self.forward_args, calls=calls),
            "both_ms": milliseconds(self.both.result(), *self.both_args, calls=calls),
            "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        }


def of_torch(args, features: int, hidden: int, blocks: int, active: int, frozen: bool) -> dict:
    """The same layer of PyTorch's grouped products, without a gate."""
    import torch

    draw = lambda *shape: (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-2] ** -0.5
    )
    unit, rank = hidden // blocks, args.rank
    # The layout that the products want, for free.
    by_columns = lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)
    x, dy = draw(args.tokens, features), draw(args.tokens, features)
    base = [by_columns(draw(blocks, features, unit)), by_columns(draw(blocks, unit, features))]
    lora = [draw(features, rank), by_columns(draw(blocks, rank, unit)),
            by_columns(draw(blocks, unit, rank)), draw(rank, features)]  # fmt: skip
    router = draw(features, blocks)
    trained = [x, router, *(lora if frozen else base)]
    for leaf in trained:
        leaf.requires_grad_()
    activate = getattr(torch.nn.functional, args.activation)
    activate = partial(activate, approximate="tanh") if args.activation == "gelu" else activate
    product = torch._grouped_mm

    def forward():
        p = torch.sigmoid((x @ router).float())
        value, chosen = p.topk(active, dim=1)
        coefficient = value / value.detach()
        order = chosen.reshape(-1).argsort(stable=True)
        token, place = order // active, order.argsort()
        ends = torch.bincount(chosen.reshape(-1), minlength=blocks).cumsum(0).to(torch.int32)
        z = product(x[token], base[0], offs=ends)
        z = z + product((x @ lora[0])[token], lora[1], offs=ends) if frozen else z
        h = activate(z)
        back = lambda rows: (
            rows[place].view(args.tokens, active, -1) * coefficient[..., None].to(rows.dtype)
        ).sum(1)
        y = back(product(h, base[1], offs=ends))
        return y + back(product(h, lora[2], offs=ends)) @ lora[3] if frozen else y

    def step():
        for leaf in trained:
            leaf.grad = None
        forward().backward(dy)

    wait = torch.cuda.synchronize
    row = {"both_ms": queued_milliseconds(step, wait)}
    with torch.no_grad():
        row["forward_ms"] = queued_milliseconds(forward, wait)
    return row


def measure(args, features: int, hidden: int, blocks: int, active: int) -> list[dict]:
    """Rows of one shape: trained, and frozen with LoRA; each of every kind of the layer."""
    x, dy = jax.random.normal(jax.random.key(1), (2, args.tokens, features), jnp.bfloat16)
    kinds = {"routed": True} | ({"kept": False} if args.keep_hidden else {})  # what recomputes
    layer = partial(routed, activation=args.activation, active=active)
    ours = partial(layer, implementation=args.implementation)
    layers = {
        "dense": partial(dense, activation=args.activation),
        "xla": partial(layer, implementation="xla"),
    } | {kind: partial(ours, recompute=recompute) for kind, recompute in kinds.items()}
    programs = {}
    with ThreadPoolExecutor() as pool:  # all are compiled before any is timed
        for way, parts in parameters(args, features, hidden, blocks).items():
            for name, layer in layers.items():
                given = (of("dense" if name == "dense" else "routed", part) for part in parts)
                calls = 1 if name == "xla" else args.calls  # slow enough, and slow to compile
                programs[way, name] = Programs.start(pool, layer, x, dy, *given, calls)
    rows = []
    for way in ("trained", "lora"):
        beside = {name: programs[way, name].time() for name in ("dense", "xla")}
        if args.torch:
            beside |= try_torch(args, features, hidden, blocks, active, way == "lora")
        for kind, recompute in kinds.items():
            mine, portable = programs[way, kind], programs[way, "xla"]
            row = {
                "features": features, "hidden": hidden, "blocks": blocks, "active": active,
                "tokens": args.tokens, "gated": args.gated, "way": way, "recompute": recompute,
                "error": check(mine.results(), portable.results()),
                "routed": mine.time(), **beside,
            }  # fmt: skip
            if jax.default_backend() == "gpu":
                row["kernels_ms"] = kernels(mine.once.result(), *mine.both_args)
            rows.append(row)
            show(row)
    return rows


def try_torch(*shape) -> dict:
    """PyTorch's times, or why there are none."""
    try:
        return {"torch": of_torch(*shape)}
    except RuntimeError as error:  # releases differ in what they derive
        print("torch:", error)
        return {"torch_error": str(error)}


def show(row: dict) -> None:
    matrices = 3 if row["gated"] else 2
    flop = 2 * matrices * row["tokens"] * row["features"] * row["hidden"]
    flop *= row["active"] / row["blocks"]
    line = f"{row['features']:5d} {row['hidden']:6d} {row['active']} of {row['blocks']}"
    line += f" {row['way']:7s} {'' if row['recompute'] else 'kept':4s}"
    for which, passes in (("forward_ms", 1), ("both_ms", 3 if row["way"] == "trained" else 2)):
        time = row["routed"][which]
        beside = {n: row[n][which] for n in ("dense", "torch", "xla") if n in row}
        told = " ".join(f"{name} {ms:.3f} x{ms / time:.2f}" for name, ms in beside.items())
        line += f" | {time:.3f} {passes * flop / time / 1e9:4.0f} {told}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "2048x8192", "4096x16384"])
    parser.add_argument("--blocks", nargs="+", default=["4/8", "2/4"], help="active of all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--activation", default="gelu", choices=["relu", "silu", "gelu"])
    parser.add_argument("--gated", action="store_true", help="SwiGLU and its kin")
    parser.add_argument("--keep-hidden", action="store_true", help="also with recompute=False")
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--torch", action="store_true", help="also PyTorch's grouped products")
    parser.add_argument("--name", default="routed_ffn_gpu", help="of the result")
    args, rows = parser.parse_args(), []
    if args.torch and args.gated:
        parser.error("--torch has no gate")
    print("    D      F   blocks   way       | forward ms, TFLOP/s, others | and backward")
    for shape in args.shapes:
        for blocks in args.blocks:
            active, count = map(int, blocks.split("/"))
            rows += measure(args, *map(int, shape.split("x")), count, active)
            save(args.name, rows)  # what there is, should the run be stopped
    print(save(args.name, rows))


if __name__ == "__main__":
    main()
