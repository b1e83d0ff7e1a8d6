"""What the attention kernels wait for: counters of Nsight Compute, kernel by kernel.

    python benchmarks/profile_gpu.py                    # --quick: short sequences

Starts itself under `ncu`, which has to be on the PATH, once for each case, and leaves the clocks
alone. bfloat16. `spion`: 16 heads of 64 and of 128 features, 16,384 tokens, a band and full columns
of blocks of 128, density .1, as in attention_gpu.py; `few`: its band.
`short`: such a band of 1,024 tokens; `middle`: `spion` of 4,096; `--only 'flex short 64'`
FlexAttention of them. `--grouped`: grouped products and PyTorch's. `qds`, `longformer`:
compound attention as in compound_gpu.py. Dense cuDNN stands beside each; `--only 'flash4 64'
'flash4 128'`: FlashAttention-4's kernels on `spion`'s lists. A row holds, for one launch,
microseconds, what share of its peak each pipe and memory reached while the kernel ran, and how many
cycles a warp waits for each reason from one of its instructions to the next.
"""

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from compound_gpu import longformer, qds
from gpu import BLOCK, both, spion_like
from harness import save

import sparsax

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the GPU
KERNELS = "block_sparse_(forward|dq|dkv)|sdpa|flash|triton|gmm|device_kernel"
FLASH4 = {"flash4 64": 64, "flash4 128": 128}  # cases that need its package: features
# Shorter sequences, of FlexAttention also: tokens, features, density.
SHORT = {
    f"{name} {features}": (length, features, density)
    for name, length, density in (("short", 1024, 0.125), ("middle", 4096, 0.1))
    for features in (64, 128)
}
# Grouped products: D, F, groups, how rows are dealt to them.
GROUPED = {
    f"{who} {d}x{f} {groups} {sizes}": (who, d, f, groups, sizes)
    for d, f in ((4096, 8192), (2048, 4096))
    for groups, sizes in ((4, "even"), (8, "even"), (8, "skewed"))
    for who in ("grouped", "torch")
}
SECTIONS = "SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats"
PIPE = re.compile(r"sm__(inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_\w+")
STALL = re.compile(r"smsp__average_warps?_latency_issue_stalled_(\w+)\.ratio|"
                   r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")  # fmt: skip
FACTS = {
    "gpu__time_duration.sum": "microseconds",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "busiest unit of multiprocessors",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory system",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "launch__registers_per_thread": "registers",
    "smsp__issue_active.avg.per_cycle_active": "instructions a cycle of each scheduler",
}
TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3}


def cases(quick: bool):
    """`(function of q, k, v, shape of them, operands)` by name."""
    length = 1024 if quick else 16384
    found = {}
    dense = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    for features in (64, 128):
        shape, blocks = (1, length, 16, features), length // BLOCK
        mask = spion_like(16, blocks, 0.5 if quick else 0.1)
        pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=BLOCK)
        found[f"spion {features}"] = sparsax.block_sparse_attention, shape, (pattern,)
        few = sparsax.BlockPattern.from_block_mask(
            spion_like(16, blocks, 0.02), q_len=length, block_q=BLOCK
        )
        found[f"few {features}"] = sparsax.block_sparse_attention, shape, (few,)
        found[f"dense {features}"] = dense, shape, ()
    for name, (length, features, _) in SHORT.items():
        pattern = sparsax.BlockPattern.from_block_mask(short(name), q_len=length, block_q=BLOCK)
        found[name] = sparsax.block_sparse_attention, (1, length, 16, features), (pattern,)
    found["qds"] = sparsax.compound_attention, (8, 2048, 12, 64), (qds(8),)
    found["dense like qds"] = dense, (8, 2048, 12, 64), ()
    scattered = longformer(4096, 64, True)
    found["longformer"] = sparsax.compound_attention, (2, 4096, 16, 64), (scattered,)
    found["dense like longformer"] = dense, (2, 4096, 16, 64), ()
    return found


def short(name: str):
    """The block mask of one of `SHORT`."""
    length, _, density = SHORT[name]
    return spion_like(16, length // BLOCK, density)


def run(name: str, quick: bool) -> None:
    """One forward and backward pass, in the process that is looked at."""
    if name.startswith("flex "):
        import flex
        import torch

        length, features, _ = SHORT[name.removeprefix("flex ")]
        lists = flex.listed(short(name.removeprefix("flex ")), BLOCK)
        _, both_passes = flex.passes((1, 16, length, features))(lists)
        both_passes()  # tunes itself
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        both_passes()
        torch.cuda.synchronize()
        return
    if name in GROUPED:
        import grouped_gpu

        who, *shape, groups, sizes = GROUPED[name]
        sizes = grouped_gpu.SIZES[sizes](8192, groups)
        if who == "torch":
            for queue in grouped_gpu.of_torch(8192, *shape, sizes).values():
                queue.run()
                queue.wait()
            return
        given = grouped_gpu.operands(8192, *shape, sizes)
        for product, call in grouped_gpu.ours("pallas").items():
            jax.block_until_ready(jax.jit(call)(*given[product]))
        return
    if name in FLASH4:
        import flash4
        import torch

        length = 1024 if quick else 16384
        mask = spion_like(16, length // BLOCK, 0.5 if quick else 0.1)
        flash4.both(flash4.draw(16, length, FLASH4[name]), mask, BLOCK)()
        torch.cuda.synchronize()
        return
    attend, shape, operands = cases(quick)[name]
    arrays = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
    jax.block_until_ready(jax.jit(both(attend))(*arrays, *operands))


def profiled(name: str, quick: bool) -> str:
    """What ncu prints about the kernels of a case, as CSV behind lines of its own."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("this needs ncu of NVIDIA Nsight Compute on the PATH")
    command = [
        ncu, "--csv", "--page", "raw", "--clock-control", "none", "--cache-control", "none",
        "--kernel-name", f"regex:{KERNELS}", *(f"--section={x}" for x in SECTIONS),
        *(["--profile-from-start", "off"] if name.startswith("flex ") else []),
        sys.executable, __file__, "--case", name, *(["--quick"] if quick else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def rows(name: str, printed: str) -> list[dict]:
    """One of each launch."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        raise SystemExit(f"{name}: no kernel was seen: {printed[-2000:]}")
    units, *launches = csv.DictReader(io.StringIO("\n".join(lines)))
    found = []
    for launch in launches:
        row: dict = {"case": name, "kernel": launch["Kernel Name"], "pipes": {}, "waits": {}}
        for key, text in launch.items():
            try:
                value = float((text or "").replace(",", ""))
            except ValueError:
                continue
            if key in FACTS:
                value *= TO_MICROSECONDS.get(units[key], 1.0)
                row[FACTS[key]] = value
            elif match := PIPE.fullmatch(key):
                row["pipes"][match[2] + " instructions" * bool(match[1])] = value
            elif match := STALL.fullmatch(key):
                row["waits"][match[1] or match[2]] = value
        for kind in ("pipes", "waits"):
            row[kind] = dict(sorted(row[kind].items(), key=lambda x: -x[1]))
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="run this one, nothing else: what ncu is given")
    parser.add_argument("--only", nargs="+", help="cases; all of attention without")
    parser.add_argument("--grouped", action="store_true", help="grouped products alone")
    parser.add_argument("--quick", action="store_true", help="short sequences")
    parser.add_argument("--name", default="profile_gpu", help="of the result")
    args = parser.parse_args()
    if args.case:
        run(args.case, args.quick)
        return
    every = []
    for name in args.only or (GROUPED if args.grouped else cases(args.quick)):
        for row in rows(name, profiled(name, args.quick)):
            every.append(row)
            print({k: x for k, x in row.items() if k != "waits"}, flush=True)
        save(args.name, every)


if __name__ == "__main__":
    main()
