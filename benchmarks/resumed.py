"""Rows of a result that a stopped run has left, so that the next one goes on where it ended."""

import json
import time

from harness import RESULTS, save


class Rows:
    """Rows by key; every new one is saved at once.

    Args:
        name: of the result.
        key: names of the fields that tell rows apart.
        resume: keep the rows that the result has, instead of starting over.
    """

    def __init__(self, name: str, key: tuple[str, ...], *, resume: bool):
        self.name, self.key = name, key
        path = RESULTS / f"{name}.json"
        self.rows = json.loads(path.read_text())["rows"] if resume and path.exists() else []

    def has(self, **fields) -> bool:
        """Whether there is a row with these values of the key's fields."""
        return any(all(row[k] == fields[k] for k in self.key) for row in self.rows)

    def add(self, begin: float, row: dict) -> dict:
        """Saves a row, with the seconds since `begin` that it took."""
        row["took"] = round(time.perf_counter() - begin, 1)
        self.rows.append(row)
        save(self.name, self.rows)
        return row
