"""What the report of attention says of how rows are dealt."""

from collections import defaultdict

import numpy as np
from report import number, table

BALANCE = """Arithmetic, not a measurement: thread blocks go to 132 multiprocessors, each to the
first that is free, and take as long as their lists of blocks (and 1.5 more a row). Shares are the
mean work of a multiprocessor over that of the last one to end. A thread block for each row tile,
head after head, waits for columns that all queries attend to; so do sorted ones where few columns
are that long. The kernels deal the long ones first and cut what would outlast everything else
into pieces, whose sums a second kernel adds in a fixed order. Of a single head there is little
else to do meanwhile."""
STAY = """Microseconds, mean of two turns, which are up to 7 % apart. With *pass* the last rows are
left to thread blocks of one row each; *4* and *8* are rows for each multiprocessor up to which none
is. The kernels keep to 8 where the L2 cache holds all keys and values, which are 34 MB with 64
features and 8,192 tokens, and else to 4."""


def balance(rows: list[dict]) -> str:
    """How busy multiprocessors are, by how row tiles are dealt."""
    ways = {"in_order": "in order", "longest_first": "longest first", "dealt": "as the kernels do"}
    cells = [
        [row["pattern"], row["walked"], str(row["longest"]), f"{row['median']:g}",
         *(f"{100 * row[way]:.0f} %" for way in ways)]
        for row in rows
    ]  # fmt: skip
    return table(["pattern", "lists of", "longest", "median", *ways.values()], cells)


def stay(rows: list[dict]) -> str:
    """Both passes by how many rows stay, and how many times as long they take if few do."""
    settings = "pass", "4", "8"
    found = defaultdict(list)
    for row in rows:
        found[row["features"], row["length"], row["pattern"], row["density"]].append(row)
    cells = []
    for (features, length, pattern, density), turns in sorted(found.items()):
        line = [str(features), f"{length:,}", pattern, f"{100 * density:.1f} %"]
        for kind in ("forward_ms", "both_ms"):
            times = {
                x: 1000 * float(np.mean([row[x][kind] for row in turns]))
                for x in settings if x in turns[0]
            }  # fmt: skip
            line += [number(times.get(x)) for x in settings]
            line += [number(times["pass"] / times[x] if x in times else None) for x in ("4", "8")]
        cells.append(line)
    ways = [*settings, "pass / 4", "pass / 8"]
    names = [f"{kind}: {way}" for kind in ("forward", "with backward") for way in ways]
    return table(["head features", "length", "pattern", "density", *names], cells)
