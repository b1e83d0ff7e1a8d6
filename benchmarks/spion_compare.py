"""The comparison itself: seed by seed and method by method, every row on disk when it is known.

`--minutes` counts from the begin of the script. Nothing is begun that cannot be finished by then,
as far as the rows tell; the last line says what is left. `--out` holds what a run goes on from and
no more: rows, pictures, the end of the dense phase, compiled programs. Copied to another machine
with a device of the same kind, it goes on there and repeats nothing:

    python benchmarks/spion_lm_gpu.py --data FOLDER --out OUT --no-bar --minutes 4
    tar c OUT | split -b 15M - spion.tar.       # in pieces, where files must be small
    cat spion.tar.* | tar x                     # elsewhere, and the first line again

A stop within the dense phase leaves a checkpoint of it in OUT/TASK/SEED/start as well, many times
as large, which may be left behind. A method that is stopped half way is trained again.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
from harness import save
from spion_compiler import Compiler
from spion_methods import FINDERS, NEEDS_WHOLE, kind_of, search_of, split_name
from spion_peers import compare_losses, missing, peers
from spion_programs import compile_all
from spion_runs import WHOLE_UP_TO, Runs
from spion_state import mebibytes, save_arrays
from spion_task import Task, dtype
from spion_time import Deadline, say

DOTS = 128  # of a picture that is kept, each way


class Book:
    """The rows of a task, and the file that they are in."""

    def __init__(self, task: Task, args: argparse.Namespace):
        self.name = f"spion_{task.name}"
        self.folder = args.out
        facts = {
            "task": task.name, "metric": task.metric, "dense": args.dense,
            "dtype": dtype().__name__, "device": jax.devices()[0].device_kind,
            "xla_flags": os.environ.get("XLA_FLAGS", ""), "size": dataclasses.asdict(task.size),
        }  # fmt: skip
        path = self.folder / f"{self.name}.json"
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]
            refuse_others(path, self.rows[0], facts)
        else:
            self.rows = []
            self.add(facts)  # before there is a checkpoint that other facts could go on from
        say(str(facts))

    def add(self, row: dict) -> None:
        """Keeps a row."""
        self.rows.append(row)
        save(self.name, self.rows, self.folder)

    def methods(self, seed: int) -> set[str]:
        """What a seed has rows of."""
        return {row["method"] for row in self.rows if row.get("seed") == seed}


def refuse_others(path: Path, kept: dict, facts: dict) -> None:
    """Rows and checkpoints of one folder are of one size, dense attention and device."""
    was, now = ({**x, **x["size"], "size": None} for x in (kept, facts))
    differ = [n for n in was | now if was.get(n) != now.get(n)]
    if differ:
        said = ", ".join(f"{n} {was.get(n)}, now {now.get(n)}" for n in differ)
        raise SystemExit(f"{path} has other facts: {said}. Give another --out, or those")


def compare(task: Task, args: argparse.Namespace, methods: list[str]) -> None:
    """Every method of every seed, until the time is up."""
    say("data is on the device")
    methods = args.methods or methods
    for name in methods:
        if split_name(name)[0] in NEEDS_WHOLE and task.size.length > WHOLE_UP_TO:
            raise SystemExit(f"{name} convolves maps of at most {WHOLE_UP_TO} tokens; leave it out")
    deadline = Deadline(args.minutes)
    book = Book(task, args)
    compare_losses(book.rows)
    for seed in range(args.seeds):
        timed = [] if args.no_peers or seed > 0 else missing(book.rows, args.dense)
        left = [name for name in methods if name not in book.methods(seed)]
        if (left or timed) and not deadline.over():
            one_seed(Runs(task, seed, args, deadline.over), left, timed, book, deadline)
    say(f"{ending(book, args, methods)} | {book.folder} holds {mebibytes(book.folder):.1f} MiB")


def one_seed(runs: Runs, left: list[str], timed: list[str], book: Book, deadline: Deadline) -> None:
    """All programs, the dense phase, the methods, the peers."""
    with Compiler(deadline.over) as compiler:
        compile_all(runs, compiler, left, timed)
    compiler.check("dense")
    with runs.turn:
        begun = not deadline.over() and runs.begin()
    if begun:
        train(runs, left, book, deadline, compiler)
        for row in peers(runs, timed, deadline, compiler):
            book.add(row)
        compare_losses(book.rows)


def train(runs: Runs, left: list[str], book: Book, deadline: Deadline, compiler: Compiler) -> None:
    """The methods in order, as far as the time goes."""
    for name in left:
        for kind in filter(None, (kind_of(name), search_of(name))):
            compiler.check(kind)
        with runs.turn:  # which may be long in coming
            if seconds(book.rows, name) > deadline.left():
                return
            row = runs.row(name)
        if row is None:
            return
        book.add(row)
        show(row)
        if runs.seed == 0:
            keep_pictures(book.folder / f"{book.name}.npz", runs, name)


def seconds(rows: list[dict], name: str) -> float:
    """What a method takes, by those of its kind that are known, or by all; 0 when none are."""
    known = [row for row in rows if "method" in row]
    own = [row for row in known if kind_of(row["method"]) == kind_of(name)]
    return float(np.median([row["seconds"] for row in own or known])) if known else 0.0


def ending(book: Book, args: argparse.Namespace, methods: list[str]) -> str:
    """The last line: what is left, and how long that takes."""
    left = {
        seed: [name for name in methods if name not in book.methods(seed)]
        for seed in range(args.seeds)
    }
    said = [f"seed {seed}: {', '.join(names)}" for seed, names in left.items() if names]
    minutes = sum(seconds(book.rows, name) for names in left.values() for name in names) / 60
    timed = [] if args.no_peers else missing(book.rows, args.dense)
    said += [f"times of {', '.join(timed)}"] if timed else []
    if not said:
        return "done"
    told = f"{minutes:.1f} minutes, compilation and times aside" if minutes else "time unknown yet"
    return f"time is up, left are {'; '.join(said)} ({told}): start it again to go on"


def keep_pictures(path: Path, runs: Runs, method: str) -> None:
    """Maps and block masks, for the report."""
    kept = dict(np.load(path)) if path.exists() else {}
    kind = np.float16 if runs.setting.blocks > 64 else np.float32
    kept["maps"] = coarser(np.asarray(runs.maps.pooled[:, 0])).astype(kind)
    if runs.maps.final is not None:
        kept["final"] = coarser(np.asarray(runs.maps.final[:, 0])).astype(kind)
    name, _ = split_name(method)
    if name != "dense":
        found = FINDERS[name](runs.setting, runs.maps)
        kept[f"mask {name}"] = coarser(np.asarray(found.to_block_mask()[:, 0]))
    save_arrays(path, **kept)


def coarser(images: np.ndarray) -> np.ndarray:
    """Pictures `[L, n, n]` of at most `DOTS` rows: means of neighbours where there are more.

    Rows and columns at the end that make no whole mean are left out.
    """
    each = -(-images.shape[-1] // DOTS)
    if each == 1:
        return images
    n = images.shape[-1] // each
    tiles = images[:, : n * each, : n * each].reshape(-1, n, each, n, each)
    return tiles.mean((2, 4), dtype=np.float32).astype(np.float16)


def show(row: dict) -> None:
    each = lambda x: " ".join(f"{y:.3f}" for y in row.get(x, []))
    ms = lambda phase: "-" if row[f"{phase}_ms"] is None else f"{row[f'{phase}_ms']:.2f}"
    say(
        f"seed {row['seed']} {row['method']:14s} {row['score']:8.4f}"
        f" valid {row['best_valid']:8.4f} before {row['before']:8.4f}"
        f" | density {each('density')} | mass {each('mass')} of {each('best_mass')}"
        f" | {ms('dense')} -> {ms('sparse')} ms | {row['seconds']:.0f} s"
    )  # fmt: skip
