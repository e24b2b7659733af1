"""The card of a zoo: what it is, how large, and how it was made, on one screen of text."""

from typing import TYPE_CHECKING

import numpy as np

from wspace.zoo.table import kind_of

if TYPE_CHECKING:
    from wspace.zoo.collection import Zoo

ROWS = 12
"""Architectures and columns shown, at most."""


def card(zoo: "Zoo") -> str:
    """What a zoo is, on one screen.

    Args:
        zoo: The zoo, or a view of it.

    Returns:
        Lines of text.
    """
    header = zoo.header
    fields = ", ".join(f"{key}={value!r}" for key, value in header.recipe["fields"].items())
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    lines = [
        f"{zoo.path}: {len(zoo):,} networks, {_size(zoo)}",
        f"  recipe   {header.recipe['class']}({fields})",
        f"  cohorts  {_progress(zoo)}",
        *(
            [f"  grouped  by {header.grouped_by}: no split parts its values"]
            * bool(header.grouped_by)
        ),
        f"  stored   {header.dtype or 'as trained'}{_time(zoo)}",
        f"  made     {header.created} with {versions}",
    ]
    lines += _table("architectures", _architectures(zoo))
    lines += _table("columns", [f"{name}: {_range(x)}" for name, x in zoo.table.items()])
    rules = zoo.splits
    lines += _table("splits", [f"{name}: {_rule(rule)}" for name, rule in rules.items()])
    lines += _table("damaged", [text.splitlines()[0] for text in zoo.damaged])
    return "\n".join(lines)


def _size(zoo: "Zoo") -> str:
    total = sum(item.stat().st_size for item in (zoo.path / "shards").iterdir())
    for step, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if total >= step:
            return f"{total / step:.1f} {unit}"
    return f"{total} bytes"


def _progress(zoo: "Zoo") -> str:
    if zoo.whole:
        return f"{zoo.header.cohorts}, all committed"
    return f"NOT WHOLE: {zoo.cohorts} of {zoo.header.cohorts} committed; build again to finish"


def _time(zoo: "Zoo") -> str:
    if zoo.steps is None:
        return ""
    return f"; {len(zoo.steps)} states of each, steps {zoo.steps[0]} … {zoo.steps[-1]}"


def _table(title: str, rows: list[str]) -> list[str]:
    more = [f"… {len(rows) - ROWS} more"] if len(rows) > ROWS else []
    return [f"  {title}", *(f"    {row}" for row in (*rows[:ROWS], *more))] if rows else []


def _architectures(zoo: "Zoo") -> list[str]:
    counts = np.bincount(zoo.kind, minlength=len(zoo.architectures))
    rows: list[str] = []
    for architecture, space, count in zip(zoo.architectures, zoo.spaces, counts, strict=True):
        size = sum(p.numel for p in space.params if not p.buffer)
        name = str(architecture)
        name = name if len(name) <= 60 else f"{name[:57]}…)"
        rows.append(f"{count:,} × {name}: {size:,} parameters, coverage {space.coverage:.3f}")
    return rows


def _range(values: np.ndarray) -> str:
    kind = kind_of(values)
    if not values.size:
        return kind
    if kind == "bool":
        return f"bool, {values.mean():.0%} true"
    if kind == "str":
        names = np.unique(values).tolist()
        listed = ", ".join(map(repr, names[:4]))
        return f"str, {listed}" if len(names) <= 4 else f"str, {len(names)} values: {listed}, …"
    if kind == "int":
        return f"int, {values.min()} … {values.max()}, {len(np.unique(values)):,} values"
    finite = values[np.isfinite(values)]
    odd = f", {len(values) - len(finite)} not finite" if len(finite) < len(values) else ""
    if not finite.size:
        return f"float{odd}"
    low, middle, high = np.quantile(finite, [0.0, 0.5, 1.0])
    return f"float, {low:.4g} … {high:.4g}, median {middle:.4g}{odd}"


def _rule(rule: object) -> str:
    return str(rule).removeprefix("Split")
