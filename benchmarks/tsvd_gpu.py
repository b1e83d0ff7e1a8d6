"""Products with factored matrices on this machine's GPU against the dense one, in one run.

    python benchmarks/tsvd_gpu.py              # --quick: two layers, few rows; --resume: go on
    python benchmarks/tsvd_gpu.py --layers "gpt2-m up" --beside &    # of others on the same GPU,
    python benchmarks/tsvd_gpu.py --layers "gpt2-m down" --beside    # which compile meanwhile

bfloat16, random factors, the layers of GPT-2 and Llama-7B. Beside the dense matmul (cuBLAS): plain
SVD of equal budget, two dense matmuls; TSVD through XLA and through the Hopper kernels, two batched
products, one fused kernel, or one for few rows, by size of the tiles; TSVD-common on both sides,
through XLA and the same kernels.
Milliseconds are medians over runs of calls inside one program; all ways of a row take turns. Up to
`--chain` rows, where a call ends before the next could be dispatched, they are those of a layer in
a chain of 16 with weights of their own, up and down again; "x" is the dense time over the way's.
What the kernels' last call of a run returns is compared with what the portable one's does. What XLA
tries algorithms for is compiled while nobody else uses the GPU.
"""

import argparse
import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from resumed import Rows, gpu
from timing import UNROLLED, Queue, kernels, milliseconds_in_turns, repeated
from tsvd_ways import (
    KERNELS,
    ROUNDED,
    SHAPES,
    dense,
    draw,
    relative_error,
    takes,
    times_tiled,
    ways,
)

from sparsax import pallas

QUICK = ["gpt2-m up", "llama-7b out"]
CHAINED = 16  # layers; too many for the L2 cache where they are large


def lowered(function, *makers):
    """The function for what the makers make, ready to be compiled: nothing is made yet."""
    return function.lower(*jax.eval_shape(lambda: [x for make in makers for x in make()]))


class Program(NamedTuple):
    """A loop over calls of a layer, or of a chain of layers, that waits to be compiled."""

    compile: Callable  # once: it remembers
    tuned: bool  # XLA tries algorithms when it compiles it
    given: Callable[[], list]  # makes the arguments
    calls: int
    layers: int

    @classmethod
    def of(cls, make, product, tuned: bool, rows: int, k: int, n: int, calls: int, layers: int):
        """In a chain half of the layers are as they are, and half of them back again."""
        shapes = [(k, n) if i % 2 == 0 else (n, k) for i in range(layers)]
        weights = lambda: [make(*shape, 2 * i + 2) for i, shape in enumerate(shapes)]
        product = jax.jit(product)  # compiled once for all layers of a shape: kernels take a while

        def chain(x, *layers):
            for of_layer in layers:
                x = product(x, *of_layer)
            return x

        given = lambda: [draw(0, rows, k), *weights()]
        looped = repeated(chain, calls, results=True)
        lowered = looped.lower(*jax.eval_shape(given))  # nothing is made yet
        return cls(functools.cache(lowered.compile), tuned, given, calls, layers)

    def kernels(self) -> dict[str, float]:
        """Milliseconds of each GPU kernel of a layer, by the profiler."""
        found = kernels(self.compile(), *self.given(), calls=1)
        return {name: ms / self.calls / self.layers for name, ms in found.items()}


def gradients(product):
    """The product and its gradients of everything."""

    def run(x, *weights):
        y, pull = jax.vjp(product, x, *weights)
        return y, pull(jnp.ones_like(y))

    return run


def in_turns(programs: dict[str, Program], repeats: int) -> tuple[dict, dict]:
    """Milliseconds of a layer of each, and what the last one returned."""
    runs = {name: (program.compile(), program.given()) for name, program in programs.items()}
    queues = {n: Queue.of(run, *x, calls=programs[n].calls) for n, (run, x) in runs.items()}
    found = milliseconds_in_turns(queues, repeats=repeats)
    returned = {n: jax.tree.leaves(run(*x)[1])[0] for n, (run, x) in runs.items()}
    return {n: ms / programs[n].layers for n, ms in found.items()}, returned


class Programs(NamedTuple):
    """What measures everything about one layer, number of rows and compression, by way."""

    beside: dict[str, str]  # of the kernels: which way has their factors
    forward: dict[str, Program]
    both: dict[str, Program]

    @classmethod
    def of(cls, args, layer: str, rows: int, ratio: float) -> "Programs":
        """Those of all ways that there are, and of the dense product."""
        k, n = SHAPES[layer]
        few = rows <= args.chain
        steps = max(1, min(args.calls, 2**41 // (rows * k * n)) // UNROLLED)
        shape = rows, k, n, UNROLLED * steps + 1, CHAINED if few else 1
        program = lambda make, product, tuned: Program.of(make, product, tuned, *shape)
        beside, forward = {}, {"dense": program(dense, jnp.matmul, True)}
        backward = args.backward and not few
        both = {"dense": program(dense, gradients(jnp.matmul), True)} if backward else {}
        for name, (make, product, portable) in ways(args, ratio, k, n).items():
            sizes = ((k, n), (n, k)) if few else ((k, n),)
            shapes = (jax.eval_shape(partial(make, *size, 2)) for size in sizes)
            if not all(takes(name, rows, weights) for weights in shapes):
                continue
            if portable is not None:
                beside[name] = portable
            forward[name] = program(make, product, portable is None)
            if both and not name.startswith((*KERNELS[1:], "common-")):
                pallas_way = partial(times_tiled, implementation="pallas")
                function = gradients(pallas_way if name.startswith("products") else product)
                both[name] = program(make, function, portable is None)
        return cls(beside, forward, both)

    def compile(self, pool, tuned: bool) -> None:
        """Compiles those that XLA tunes or the others, all at once."""
        programs = [*self.forward.values(), *self.both.values()]
        list(pool.map(lambda program: program.compile(), (p for p in programs if p.tuned == tuned)))

    def measured(self, args, rows: int) -> dict:
        """The parts of a row."""
        most = ROUNDED * (
            CHAINED**0.5 if rows <= args.chain else 1
        )  # of a chain's layers, at random
        ms, returned = in_turns(self.forward, args.repeats)
        errors = {
            name: relative_error(name, returned[name], returned[portable], most)
            for name, portable in self.beside.items()
        }
        row = {"errors": errors, "ms": ms}
        if self.both:
            row["both_ms"], _ = in_turns(self.both, args.repeats)
        if profiled := [name for name in args.profile if name in self.forward]:
            row["kernels_ms"] = {name: self.forward[name].kernels() for name in profiled}
        return row


def show(row: dict) -> None:
    for which in (x for x in ("ms", "both_ms") if x in row):
        whole = row[which]["dense"]
        told = "  ".join(f"{k} {whole / ms:.2f}" for k, ms in row[which].items() if k != "dense")
        where = f"{row['layer']:13s} M={row['rows']:<5d} {row['ratio']:.0f}x {which:7s}"
        print(f"{where} dense {whole:.4f} ms | x {told} | {row['took']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512, 4096, 8192])
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--common-tiles", type=int, nargs="+", default=[128, 256, 512])
    kinds = ["svd", "common", "xla", *KERNELS]
    parser.add_argument("--ways", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--chain", type=int, default=16, help="up to so many rows")
    parser.add_argument("--calls", type=int, default=48, help="in one program, about")
    parser.add_argument("--repeats", type=int, default=5, help="of a timing")
    parser.add_argument(
        "--backward", action="store_true", help="and the gradients, of single calls"
    )
    parser.add_argument("--profile", nargs="+", default=[], help="ways whose kernels are told")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--beside", action="store_true", help="of others like it: take turns")
    parser.add_argument("--name", default="tsvd_gpu", help="of the result")
    args = parser.parse_args()
    if not {"xla", *KERNELS}.isdisjoint(args.ways) and "xla" not in args.ways:
        parser.error(f"--ways {' '.join(args.ways)}: kernels are compared with xla, name it too")
    args.kernels = pallas.on_hopper()
    if args.quick:
        args.layers, args.rows, args.tiles = QUICK, [16, 8192], [256, 512]
    done = Rows(args.name, ("layer", "rows", "ratio"), resume=args.resume, beside=args.beside)
    turn = gpu if args.beside else lambda *, alone: contextlib.nullcontext()
    for layer, rows in itertools.product(args.layers, args.rows):
        begin = time.perf_counter()
        ratios = [r for r in args.ratios if not done.has(layer=layer, rows=rows, ratio=r)]
        with turn(alone=False), ThreadPoolExecutor() as pool:
            missing = {ratio: Programs.of(args, layer, rows, ratio) for ratio in ratios}
            for programs in missing.values():
                programs.compile(pool, tuned=False)
        with turn(alone=True), ThreadPoolExecutor() as pool:  # nobody disturbs what XLA tunes
            for programs in missing.values():
                programs.compile(pool, tuned=True)
            for ratio, programs in missing.items():
                row = {"layer": layer, "rows": rows, "ratio": ratio, "features": SHAPES[layer]}
                show(done.add(begin, row | programs.measured(args, rows)))
                begin = time.perf_counter()


if __name__ == "__main__":
    main()
