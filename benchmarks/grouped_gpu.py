"""Grouped matrix products on this machine's GPU against the alternatives, in one run.

    python benchmarks/grouped_gpu.py

bfloat16; rows are dealt to the groups evenly or by a random share ("skewed", with an empty group).
Milliseconds are the medians of runs of calls inside one program (of PyTorch: of queued calls), for
the product and for both of its gradients, where who is compared takes turns; TFLOP/s count every
row once. In the same run: one dense matmul of as many FLOPs (cuBLAS), the portable implementation,
`jax.lax.ragged_dot` and, where PyTorch imports, `torch._grouped_mm`. Results are compared with
those of the portable implementation first.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from harness import save
from timing import Queue, kernels, milliseconds_in_turns, repeated

import sparsax

try:
    import torch
except ImportError:  # the peer is optional
    torch = None

# What each product multiplies; the sizes come third.
PRODUCTS = {"gmm": ("x", "w"), "dx": ("dy", "w"), "dw": ("x", "dy")}
SLOW = "xla", "ragged_dot"  # are timed apart from the others
TO_WEIGHTS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def even(rows: int, groups: int) -> np.ndarray:
    """As many rows for each group, but for the remainder."""
    return np.diff(np.linspace(0, rows, groups + 1).astype(int))


def skewed(rows: int, groups: int) -> np.ndarray:
    """Shares as of an untrained router, no size a multiple of a tile, and one group empty."""
    share = np.random.default_rng(0).dirichlet(np.ones(groups))
    share[groups // 2] = 0
    return np.random.default_rng(1).multinomial(rows, share / share.sum())


SIZES = {"even": even, "skewed": skewed}


def ours(implementation: str) -> dict:
    """The product and its gradients as functions of two operands and the sizes."""
    options = {"implementation": implementation}
    return {
        "gmm": lambda x, w, n: sparsax.gmm(x, w, n, **options),
        "dx": lambda dy, w, n: sparsax.gmm(dy, w, n, transpose_w=True, **options),
        "dw": lambda x, dy, n: sparsax.tgmm(x, dy, n, **options),
    }


DENSE = {
    "gmm": lambda x, w, n: x @ w[0],
    "dx": lambda dy, w, n: dy @ w[0].T,
    "dw": lambda x, dy, n: x.T @ dy,
}
RAGGED_DOT = {
    "gmm": jax.lax.ragged_dot,
    "dx": lambda dy, w, n: jax.lax.ragged_dot(dy, w.swapaxes(1, 2), n),
    "dw": lambda x, dy, n: jax.lax.ragged_dot_general(x, dy, n, TO_WEIGHTS),
}


def operands(rows: int, features: int, columns: int, sizes: np.ndarray) -> dict[str, tuple]:
    """What each product is given."""
    shapes = {"x": (rows, features), "w": (len(sizes), features, columns), "dy": (rows, columns)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    sizes = jnp.asarray(sizes, jnp.int32)
    return {name: (drawn[a], drawn[b], sizes) for name, (a, b) in PRODUCTS.items()}


def rivals(args, groups: int) -> dict[str, dict]:
    """Who computes the products."""
    found = {args.implementation: ours(args.implementation), "dense": DENSE, "xla": ours("xla")}
    return found | ({"ragged_dot": RAGGED_DOT} if groups <= args.ragged_dot_up_to else {})


def calls_of(args, who: str) -> int:
    """How many calls a loop has: of the portable products, slow to compile and to run, one."""
    return 1 if who == "xla" else args.calls


def programs(args, given, groups: int) -> tuple[dict, dict]:
    """Single calls of ours and of the portable products, and everybody's loops of calls, compiled.

    All together, because XLA tunes some of them for long; for all sizes, which are data.
    """
    with ThreadPoolExecutor() as pool:
        compile_ = lambda run, name: pool.submit(run.lower(*given[name]).compile)
        once = {
            who: {name: compile_(jax.jit(ours(who)[name]), name) for name in PRODUCTS}
            for who in (args.implementation, "xla")
        }
        loops = {
            who: {n: compile_(repeated(products[n], calls_of(args, who)), n) for n in PRODUCTS}
            for who, products in rivals(args, groups).items()
        }
    return jax.tree.map(lambda future: future.result(), (once, loops))


def check(ours, portable, given) -> dict[str, float]:
    """Relative L2 error of each product to the portable one's; more than rounding is an error."""
    found, norm = {}, lambda a: jnp.linalg.norm(a.astype(jnp.float32).reshape(-1))
    for name in PRODUCTS:
        got, want = (product[name](*given[name]) for product in (ours, portable))
        found[name] = float(norm(got.astype(jnp.float32) - want) / norm(want))
        if not found[name] < 1e-2:
            raise SystemExit(f"{name} is wrong: relative error {found[name]}")
    return found


def of_torch(rows: int, features: int, columns: int, sizes) -> dict[str, Queue]:
    """PyTorch's products of these sizes."""
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    x, w, dy = draw(rows, features), draw(len(sizes), features, columns), draw(rows, columns)
    by_columns = w.transpose(1, 2).contiguous().transpose(1, 2)  # the layout it wants, for free
    products = {
        "gmm": lambda: torch._grouped_mm(x, by_columns, offs=ends),
        "dx": lambda: torch._grouped_mm(dy, w.transpose(1, 2), offs=ends),
        "dw": lambda: torch._grouped_mm(x.t(), dy, offs=ends),
    }
    wait = torch.cuda.synchronize
    return {name: Queue(run, wait) for name, run in products.items()}


def measure(args, once, loops, features: int, columns: int, groups: int, deal: str) -> dict:
    """Everything about one shape and one way to deal the rows."""
    sizes = SIZES[deal](args.rows, groups)
    given = operands(args.rows, features, columns, sizes)
    mine = once[args.implementation]
    row = {
        "rows": args.rows, "features": features, "columns": columns, "groups": groups,
        "sizes": deal, "errors": check(mine, once["xla"], given),
    }  # fmt: skip
    queues = {
        who: {n: Queue.of(run[n], *given[n], calls=calls_of(args, who)) for n in run}
        for who, run in loops.items()
    }
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and hasattr(torch, "_grouped_mm"):
        queues["torch"] = of_torch(args.rows, features, columns, sizes)
    slow = {who: queues.pop(who) for who in SLOW if who in queues}
    for together in (queues, slow):  # what draws little power would give the next one an advantage
        for name in PRODUCTS:
            found = milliseconds_in_turns(
                {who: queue[name] for who, queue in together.items()}, repeats=args.repeats
            )
            for who, ms in found.items():
                row.setdefault(f"{who}_ms", {})[name] = ms
    if on_gpu:
        row["kernels_ms"] = {n: kernels(mine[n], *given[n]) for n in PRODUCTS}
    return row


def show(row: dict, flop: float) -> None:
    """One line for each product."""
    times = {key[:-3]: value for key, value in row.items() if key.endswith("_ms")}
    times.pop("kernels", None)
    for name in PRODUCTS:
        told = "  ".join(
            f"{k} {v[name]:8.3f} ({flop / v[name] / 1e9:4.0f})" for k, v in times.items()
        )
        where = f"{row['features']}x{row['columns']} G={row['groups']:<3d} {row['sizes']:6s}"
        print(f"{where} {name:3s}  {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=["4096x8192", "2048x4096"])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 64])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--ragged-dot-up-to", type=int, default=8, help="groups; it may mask x once for each"
    )
    args, rows = parser.parse_args(), []
    print("ms (TFLOP/s)")
    for shape in args.shapes:
        features, columns = map(int, shape.split("x"))
        for groups in args.groups:
            given = operands(args.rows, features, columns, even(args.rows, groups))
            compiled = programs(args, given, groups)
            for deal in args.sizes:
                rows.append(measure(args, *compiled, features, columns, groups, deal))
                show(rows[-1], 2 * args.rows * features * columns)
                save("grouped_gpu", rows)  # what there is, should the run be stopped
    print(save("grouped_gpu", rows))


if __name__ == "__main__":
    main()
