"""A user's model to a sparse one: rules by path and module type, a new model, and a report.

A rule says which modules it replaces, may watch their inputs on calibration data, and converts
all of its modules in one call, so that it can spread one budget over them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from sparsax.nn import named_modules, replace_modules

# Of a device like an H200, a second: operations in 16 bits, bytes of memory.
FLOPS, BANDWIDTH = 7e14, 4e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What happened to one module.

    Attributes:
        path: where it stands in the model.
        before: name of its type.
        after: name of the type that replaces it; the same when it was kept.
        detail: what was chosen, such as tile and rank, in words.
        error: relative error of its weights, or of its outputs when the rule was calibrated.
        parameters: (before, after).
        bytes: (before, after).
        flops: (before, after), for one row of input.
    """

    path: str
    before: str
    after: str
    detail: str
    error: float
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[int, int]

    def seconds(self, rows: int, *, flops: float, bandwidth: float) -> tuple[float, float]:
        """What (before, after) take at least for rows of input: arithmetic or reading weights.

        Args:
            rows: of input.
            flops: the device's, a second.
            bandwidth: of its memory, bytes a second.
        """
        work = [
            max(rows * f / flops, b / bandwidth)
            for f, b in zip(self.flops, self.bytes, strict=True)
        ]
        return work[0], work[1]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `sparsify` did, module by module; `print` shows a table.

    Attributes:
        rows: one for every matched module.
        parameters: numbers in the whole model, (before, after).
    """

    rows: tuple[Row, ...]
    parameters: tuple[int, int]

    def total(self, what: str) -> tuple[int, int]:
        """The sum of "parameters", "bytes" or "flops" over the rows, (before, after)."""
        pairs = [getattr(row, what) for row in self.rows]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def seconds(
        self, rows: int, *, flops: float = FLOPS, bandwidth: float = BANDWIDTH
    ) -> tuple[float, float]:
        """The sum of `Row.seconds`, (before, after): what these modules take at least.

        The defaults, 700 TFLOP/s and 4 TB/s, are for an H200 in 16 bits.
        """
        pairs = [row.seconds(rows, flops=flops, bandwidth=bandwidth) for row in self.rows]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.rows)
        detail = max(len(row.detail) for row in self.rows)
        lines = [
            f"{'path':{width}}  {'how':{detail}}  error      kB            MFLOP a row",
            *(
                f"{row.path:{width}}  {row.detail:{detail}}  {row.error:5.3f}  "
                f"{_arrow(row.bytes, 1e3, 0)}  {_arrow(row.flops, 1e6, 3)}"
                for row in self.rows
            ),
            f"{'these':{width}}  {'':{detail}}         "
            f"{_arrow(self.total('bytes'), 1e3, 0)}  {_arrow(self.total('flops'), 1e6, 3)}",
            f"parameters: {self.total('parameters')[0]:,} -> {self.total('parameters')[1]:,} "
            f"of these, {self.parameters[0]:,} -> {self.parameters[1]:,} of the model",
            *(
                f"{rows:,} rows, at least, at {FLOPS / 1e12:.0f} TFLOP/s and "
                f"{BANDWIDTH / 1e12:.0f} TB/s: {_arrow(self.seconds(rows), 1e-6, 1)} us"
                for rows in (1, 4096)
            ),
        ]
        return "\n".join(lines)


def _arrow(pair: tuple[int | float, int | float], unit: float, digits: int) -> str:
    return f"{pair[0] / unit:8.{digits}f} ->{pair[1] / unit:8.{digits}f}"


@runtime_checkable
class Rule(Protocol):
    r"""Which modules to replace, and by what. `sparsax.rules` has those of the package.

    Anything with these four members is a rule.
    """

    @property
    def path(self) -> str:
        r"""Regular expression for the whole path of a module, e.g. `r".*\.(up|down)"`."""
        ...

    @property
    def modules(self) -> tuple[type[nnx.Module], ...]:
        """Types of modules to consider; others with a matching path are left alone."""
        ...

    def observer(self, module: nnx.Module) -> nnx.Module | None:
        """A module that does what `module` does and notes its inputs; None to go without."""
        ...

    def convert(
        self, found: Mapping[str, nnx.Module], observers: Mapping[str, nnx.Module]
    ) -> dict[str, tuple[nnx.Module, Row]]:
        """The replacement and its row, for all matched modules together.

        Args:
            found: the matched modules by path.
            observers: what `observer` made, after calibration; empty without.
        """
        ...


def sparsify[M: nnx.Module](
    model: M, rules: Sequence[Rule], *, calibrate: Callable[[M], Any] | None = None
) -> tuple[M, Report]:
    r"""A copy of a model in which rules have replaced modules, and a report of what they did.

    Args:
        model: any nnx model; it is left as it is.
        rules: applied to disjoint sets of modules.
        calibrate: runs the model it is given on a few batches, e.g. `lambda m: m(tokens)`, for
            rules that watch their inputs. The model is a scratch copy.

    Returns:
        `(new model, report)`. Modules that the model shares are replaced once and stay shared.

    Raises:
        ValueError: a rule matches nothing, two rules match one module, a rule needs `calibrate`
            or a watched module was never called, or a rule cannot convert a module.

    Example:
        >>> import sparsax
        >>> from flax import nnx
        >>> model = sparsax.nn.Encoder(100, 16, rngs=nnx.Rngs(0))
        >>> rule = sparsax.rules.TSVD(path=r"blocks\.\d+\.(up|down)", ratio=2)
        >>> small, report = sparsax.sparsify(model, [rule])
        >>> [row.path for row in report.rows]
        ['blocks.0.down', 'blocks.0.up', 'blocks.1.down', 'blocks.1.up']
        >>> before, after = report.total("parameters")
        >>> before, after <= before / 2
        (32768, True)
    """
    if not rules:
        raise ValueError("rules must name at least one rule; got none.")
    new = nnx.clone(model)
    matched = _match(new, rules)
    observers = _observe(new, rules, matched, calibrate)
    rows: list[Row] = []
    for rule, found in zip(rules, matched, strict=True):
        made = rule.convert(found, {p: observers[p] for p in found if p in observers})
        replace_modules(new, {path: module for path, (module, _) in made.items()})
        rows += [row for _, row in made.values()]
    return new, Report(tuple(rows), (_parameters(model), _parameters(new)))


def _match(model: nnx.Module, rules: Sequence[Rule]) -> list[dict[str, nnx.Module]]:
    owner: dict[str, Rule] = {}
    matched = []
    for rule in rules:
        of_type = {p: m for p, m in named_modules(model).items() if isinstance(m, rule.modules)}
        found = {path: m for path, m in of_type.items() if path and re.fullmatch(rule.path, path)}
        names = " or ".join(kind.__name__ for kind in rule.modules)
        if not found:
            raise ValueError(
                f"path={rule.path!r} must match a module of type {names}; the model's are "
                f"{list(of_type) or 'none'}."
            )
        if twice := sorted(set(found) & set(owner)):
            raise ValueError(
                f"every module must be matched by one rule; {twice} match both "
                f"path={owner[twice[0]].path!r} and path={rule.path!r}."
            )
        owner |= dict.fromkeys(found, rule)
        matched.append(found)
    return matched


def _observe(model, rules, matched, calibrate) -> dict[str, nnx.Module]:
    """The rules' observers, after the calibration data went through a scratch copy."""
    scratch = nnx.clone(model)
    modules = named_modules(scratch)
    observers = {
        path: observer
        for rule, found in zip(rules, matched, strict=True)
        for path in found
        if (observer := rule.observer(modules[path])) is not None
    }
    if observers and calibrate is None:
        raise ValueError(
            "these rules watch the inputs of their modules: pass calibrate=, a function that runs "
            "the model it is given on a few batches."
        )
    if observers and calibrate is not None:
        replace_modules(scratch, observers)
        calibrate(scratch)
    return observers


def _parameters(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
