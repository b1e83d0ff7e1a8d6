"""What tells the kernels which pairs attend, where that follows from ids of queries and keys."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PairRule(Protocol):
    """A hashable rule over the integers that stand at every position of queries and of keys.

    The kernels read them from arrays `[B, 1 or heads, ids, positions]`, of queries and of keys,
    whole row tiles; keys have one row tile more, of such that no query sees.
    """

    @property
    def query_ids(self) -> int:
        """Integers of a query."""
        ...

    @property
    def key_ids(self) -> int:
        """Integers of a key."""
        ...

    @property
    def per_head(self) -> bool:
        """Whether heads have integers of their own: queries by query head, keys by kv head."""
        ...

    @property
    def blocks(self) -> bool:
        """Whether the bits of the lists are asked for, too."""
        ...

    @property
    def says_all(self) -> bool:
        """Whether nothing else need be asked, of absent keys and of those past the end either."""
        ...

    @property
    def keys_in_rows(self) -> bool:
        """Whether the rows of a tile are keys, as for dK and dV."""
        ...

    def turned(self) -> "PairRule":
        """The rule for tiles whose rows are keys."""
        ...

    def keep(self, rows, cols, listed, shape: tuple[int, ...]) -> Any:
        """Boolean matrix of the pairs that attend, from vectors of its rows and of its columns.

        `listed` is what the bits say of each pair, None where they say nothing.
        """
        ...
