"""The comparison itself: seed by seed and method by method, every row on disk when it is known."""

import argparse
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from harness import save
from spion_methods import FINDERS, NEEDS_WHOLE, split_name
from spion_peers import MATERIALISED, compare_losses, missing, peers
from spion_runs import WHOLE_UP_TO, Runs
from spion_task import Task, dtype


class Book:
    """The rows of a task, and the file that they are in."""

    def __init__(self, task: Task, args: argparse.Namespace):
        self.name = f"spion_{task.name}"
        self.folder = args.out
        facts = {
            "task": task.name, "metric": task.metric, "dense": args.dense,
            "dtype": dtype().__name__, "device": jax.devices()[0].device_kind,
            "size": dataclasses.asdict(task.size),
        }  # fmt: skip
        path = self.folder / f"{self.name}.json"
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]
            refuse_others(path, self.rows[0], facts)
        else:
            self.rows = []
            self.add(facts)  # before there is a checkpoint that other facts could go on from
        print(facts, flush=True)

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
    methods = args.methods or methods
    for name in methods:
        if split_name(name)[0] in NEEDS_WHOLE and task.size.length > WHOLE_UP_TO:
            raise SystemExit(f"{name} convolves maps of at most {WHOLE_UP_TO} tokens; leave it out")
    deadline = time.monotonic() + 60 * args.minutes
    stop = lambda: time.monotonic() > deadline
    book = Book(task, args)
    compare_losses(book.rows)
    for seed in range(args.seeds):
        if set(methods) - book.methods(seed) and not stop():
            one_seed(Runs(task, seed, args, stop), methods, book)
    print("time is up: start it again to go on" if stop() else "done", book.folder, flush=True)


def one_seed(runs: Runs, methods: list[str], book: Book) -> None:
    """The dense phase, while all programs are compiled; times and memory; the methods."""
    done, args = book.methods(runs.seed), runs.args
    left = [x for x in methods if x not in done or x == "dense"]  # read again, for its maps
    kinds = {(split_name(x)[1], "heads" if x.startswith("heads") else "shared")
             for x in left if x != "dense"}  # fmt: skip
    timed = [] if args.no_peers else missing(book.rows, args.dense)
    if timed:
        kinds |= {("drop", "shared")}
    if MATERIALISED in timed:
        kinds |= {("drop", "materialised")}
    with ThreadPoolExecutor(4) as pool:
        programs = [pool.submit(runs.compile, *kind) for kind in sorted(kinds)]
        begun = runs.begin()
    for program in programs:
        program.result()
    if not begun:
        return
    for row in peers(runs, timed):
        book.add(row)
    compare_losses(book.rows)
    for method in left:
        row = runs.row(method)
        if row is None:
            return
        if method not in done:
            book.add(row)
            show(row)
            if runs.seed == 0:
                keep_pictures(book.folder / f"{book.name}.npz", runs, method)


def keep_pictures(path: Path, runs: Runs, method: str) -> None:
    """Maps and block masks, for the report."""
    kept = dict(np.load(path)) if path.exists() else {}
    kept["maps"] = np.asarray(
        runs.maps.pooled[:, 0], np.float16 if runs.setting.blocks > 64 else np.float32
    )
    if runs.maps.final is not None:
        kept["final"] = np.asarray(runs.maps.final[:, 0])
    name, _ = split_name(method)
    if name != "dense":
        found = FINDERS[name](runs.setting, runs.maps)
        kept[f"mask {name}"] = np.asarray(found.to_block_mask()[:, 0])
    np.savez_compressed(path, **kept)


def show(row: dict) -> None:
    each = lambda x: " ".join(f"{y:.3f}" for y in row.get(x, []))
    ms = lambda phase: "-" if row[f"{phase}_ms"] is None else f"{row[f'{phase}_ms']:.2f}"
    print(
        f"seed {row['seed']} {row['method']:14s} {row['score']:8.4f}"
        f" valid {row['best_valid']:8.4f} before {row['before']:8.4f}"
        f" | density {each('density')} | mass {each('mass')} of {each('best_mass')}"
        f" | {ms('dense')} -> {ms('sparse')} ms | {row['seconds']:.0f} s", flush=True,
    )  # fmt: skip
