"""What the reports share: numbers, tables, and where figures come from."""

import json
from pathlib import Path

import numpy as np
from harness import RESULTS

DOCS = RESULTS.parents[1] / "docs"


def read(name: str, folder: Path = RESULTS) -> dict | None:
    """The record `NAME.json`, if it is there."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def number(x: float | None) -> str:
    """Three digits, or a dash."""
    if x is None:
        return "-"
    return f"{x:,.0f}" if x >= 100 else f"{x:.{max(0, 2 - int(np.floor(np.log10(x))))}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def origin(name: str, record: dict) -> str:
    """Where the figures of a result come from: every command, commit and version in it."""
    parts = [x for row in record["rows"] for x in (row, *row.values()) if isinstance(x, dict)]
    # Those of the record are the last run's: they stand for what does not tell its own.
    told = lambda key: list(dict.fromkeys(x[key] for x in parts if key in x)) or [record[key]]
    versions = {package: [version] for package, version in record["versions"].items()}
    for package, version in (x for part in parts for x in part.get("versions", {}).items()):
        if version not in versions.setdefault(package, []):
            versions[package].append(version)
    commands = " and ".join(f"`{command}`" for command in told("command"))
    cards = " and one ".join(told("device"))
    used = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    note = f" The file holds {record['note']}." if "note" in record else ""
    return (
        f"`benchmarks/results/{name}.json`: {commands} on one {cards}, commit "
        f"{' and '.join(told('commit'))}, {used}.{note}"
    )
