"""Timing, memory and the record that every result file starts with."""

import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import jaxlib
import numpy as np

RESULTS = Path(__file__).parent / "results"


def measure(function, *args, repeats: int = 5) -> dict[str, float]:
    """Median, fastest and slowest seconds of a jitted call, and its peak memory in bytes.

    Memory is what XLA's buffer assignment reserves beside the arguments: temporaries and outputs.
    """
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": float(np.median(seconds)), "fastest": min(seconds), "slowest": max(seconds),
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }  # fmt: skip


def save(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Writes `NAME.json` in the folder with what is needed to read it later, all of it or nothing.

    What is no finite number becomes null.
    """
    record = {
        "command": command(),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "cores": len(jax.devices()) if jax.default_backend() != "cpu" else _cores(),
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "rows": rows,
    }  # fmt: skip
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite, indent=1) + "\n")
    os.replace(partial, path)  # noqa: PTH105 (atomic by name)
    return path


def command() -> str:
    """What runs."""
    return shlex.join(["python", *sys.argv])


@functools.cache
def commit() -> str:
    """The commit that runs, and whether the package differs from it.

    The environment's GIT_COMMIT names it where the code runs outside of its repository.
    """
    if told := os.environ.get("GIT_COMMIT"):
        return told
    package = Path(__file__).parents[1] / "sparsax"
    ask = lambda *x: subprocess.run(["git", *x], cwd=package, capture_output=True, text=True).stdout
    changes = "+changes" if ask("status", "--porcelain", ".") else ""
    return ask("rev-parse", "--short", "HEAD").strip() + changes


def _cores() -> int:
    return len(os.sched_getaffinity(0))
