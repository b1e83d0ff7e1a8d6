"""Results that a stopped run loses nothing of: what is measured is saved at once."""

import contextlib
import fcntl
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from filelock import FileLock
from harness import RESULTS, command, commit, save


def read(name: str) -> list[dict]:
    """The rows of `results/NAME.json`, which this device measured; none without such a file."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record, device = json.loads(path.read_text()), jax.devices()[0].device_kind
    if record["device"] != device:
        raise SystemExit(f"{path} is of {record['device']}, this is {device}: give another --name")
    was, now = record.get("xla_flags", ""), os.environ.get("XLA_FLAGS", "")
    if was != now:
        raise SystemExit(f"{path} is of XLA_FLAGS={was!r}, now {now!r}: give another --name")
    return record["rows"]


def need(*packages: str) -> None:
    """Ends the run at once where one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"this needs {', '.join(missing)}: install it, or leave its peers out.")


def stamp(begin: float) -> dict:
    """Where one measurement comes from: a result that was resumed has several commands, commits."""
    took = round(time.perf_counter() - begin, 1)
    return {"took": took, "command": command(), "commit": commit()}


class Results:
    """The rows of a result by their keys, made of parts: ours, and each peer's.

    Args:
        name: of the result.
        resume: whether to go on with what the file has; parts that failed are tried again.
    """

    def __init__(self, name: str, *, resume: bool):
        self.name = name
        self.rows = {row["key"]: row for row in (read(name) if resume else [])}

    def row(self, key: str, **told) -> dict:
        """The row of that key, a new one with what is told of it."""
        return self.rows.setdefault(key, {"key": key, **told})

    def lacks(self, key: str, part: str) -> bool:
        """Whether the part is still to be measured."""
        found = self.rows.get(key, {}).get(part)
        return found is None or "error" in found

    def add(self, begin: float, key: str, part: str, measured: dict) -> None:
        """Stores a part with its `stamp` and saves all."""
        self.row(key)[part] = measured | stamp(begin)
        save(self.name, list(self.rows.values()))

    def measure(self, key: str, part: str, measured: Callable[[], dict]) -> None:
        """Measures a part that is not there yet. A peer that fails is told of, and ends no run."""
        if not self.lacks(key, part):
            return
        begin = time.perf_counter()
        try:
            found = measured()
        except RuntimeError as error:  # out of memory, or what a compiler cannot do
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{key}, {part}: {found['error'][:200]}", flush=True)
        self.add(begin, key, part, found)

    def end(self, *parts: str) -> None:
        """Ends the run as failed where one of these parts, which are no peers, failed in a row."""
        failed = [
            f"{part} of {key}" for key, row in self.rows.items() for part in parts
            if "error" in row.get(part, {})
        ]  # fmt: skip
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; the result says why")


class Rows:
    """Rows told apart by some of their fields; every new one is saved at once.

    Args:
        name: of the result.
        key: names of the fields that tell rows apart.
        resume: keep the rows that the result has, instead of starting over.
        beside: other processes add rows to the result meanwhile; it implies `resume`.
    """

    def __init__(
        self, name: str, key: tuple[str, ...], *, resume: bool = False, beside: bool = False
    ):
        self.name, self.key, self.beside = name, key, beside
        self.alone = turns(name) if beside else contextlib.nullcontext()
        with self.alone:
            self.rows = read(name) if resume or beside else []
            if beside:
                save(name, self.rows)  # there for all, whoever adds first

    def has(self, **fields) -> bool:
        """Whether there is a row with these values of the key's fields."""
        return any(all(row[k] == fields[k] for k in self.key) for row in self.rows)

    def add(self, begin: float, row: dict) -> dict:
        """Saves a row with its `stamp`."""
        row |= stamp(begin)
        with self.alone:
            if self.beside:
                self.rows = json.loads((RESULTS / f"{self.name}.json").read_text())["rows"]
            self.rows.append(row)
            save(self.name, self.rows)
        return row


def turns(name: str) -> FileLock:
    """The lock by which processes take turns at what has this name."""
    return FileLock(Path(tempfile.gettempdir()) / f"sparsax.{name}.lock")


def turns_on_gpu() -> FileLock:
    """The lock of the GPUs that this process sees, for what is timed."""
    return turns(f"gpu {os.environ.get('CUDA_VISIBLE_DEVICES', '0').replace('/', '-')}")


@contextlib.contextmanager
def gpu(*, alone: bool):
    """Has the GPU that this process sees alone, to time, or together with others, to compile.

    Compiling uses the GPU too: XLA tries algorithms there. So whoever times waits until nobody
    compiles.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").replace("/", "-")
    with (Path(tempfile.gettempdir()) / f"sparsax.compiling {visible}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield  # closing the file gives the lock back
