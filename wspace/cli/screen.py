"""What the commands show: consoles, tables that fit the width, numbers, and progress.

Names and messages are put on screen as plain text, never as rich's markup: they may hold brackets.
"""

import json
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wspace.report.page import write_whole
from wspace.space import Group, Param, WeightSpace

PIPED_WIDTH = 160
HEAD, TAIL = 24, 8


def console(*, stderr: bool = False) -> Console:
    """A console on a standard stream; into a pipe it writes wide lines, and no colour."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, highlight=False, width=PIPED_WIDTH if piped else None)


@contextmanager
def working(what: str) -> Generator[None]:
    """A spinner on stderr for as long as the block runs, if someone is there to see it."""
    errors = console(stderr=True)
    if errors.is_terminal:
        with errors.status(Text(what)):
            yield
    else:
        yield


def count(number: int) -> str:
    """A number of things in at most seven characters: ``12,345``, ``124.4 M``."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def size(number: int) -> str:
    """A number of bytes, to read: ``1.5 MB``."""
    for step, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= step:
            return f"{number / step:.1f} {unit}"
    return f"{number} bytes"


def plural(number: int, noun: str) -> str:
    """A count with its noun: ``1 group``, ``3 groups``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def facts(out: Console, title: str, rows: Iterable[tuple[str, str | Text]]) -> None:
    """A heading and lines of the form *what: finding*.

    Args:
        out: Where to print.
        title: The heading.
        rows: Names and findings; those without a finding are left out.
    """
    out.print(Text(title, "bold"))
    lines(out, rows)


def lines(out: Console, rows: Iterable[tuple[str, str | Text]]) -> None:
    """The lines of `facts`, without a heading."""
    grid = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    grid.add_column(overflow="fold")
    for name, finding in rows:
        if finding:
            grid.add_row(name, finding if isinstance(finding, Text) else Text(finding))
    out.print(grid)


def table(
    out: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    everything: bool = False,
) -> None:
    """A table; long ones lose their middle. Columns named with a leading ``>`` align right.

    Args:
        out: Where to print.
        columns: Their headings.
        rows: Their cells. A column that is empty in all rows is left out.
        everything: Show the middle too.
    """
    used = [i for i in range(len(columns)) if any(str(row[i]) for row in rows)]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for i in used:
        right = columns[i].startswith(">")
        grid.add_column(
            columns[i].removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    cut = not everything and len(rows) > HEAD + TAIL + 1
    shown = [*rows[:HEAD], *rows[-TAIL:]] if cut else rows
    for at, row in enumerate(shown):
        if cut and at == HEAD:
            note = f"… {len(rows) - HEAD - TAIL} more (--all)"
            grid.add_row(Text(note, "dim"), *[""] * (len(used) - 1))
        grid.add_row(*(c if isinstance(c := row[i], Text) else Text(c) for i in used))
    out.print(grid)
    out.print()


def groups_table(out: Console, space: WeightSpace, *, everything: bool = False) -> None:
    """The free groups: what moves them, what they depend on, and how much moves with them."""
    moved = {name: elements_moved(space, name) for name in space.groups}
    total = sum(p.numel for p in space.params if not p.buffer)
    rows = [
        [
            Text(g.name, "cyan"),
            f"{g.size:,}",
            kinds_of(space, g),
            f"each {'*'.join(g.over)}" if g.over else "",
            str(moved[g.name][0]),
            count(moved[g.name][1]),
            f"{100 * moved[g.name][1] / max(total, 1):.1f}%",
        ]
        for g in space.groups.values()
    ]
    columns = ["group", ">size", "kinds", "own for", ">tensors", ">elements", ">share"]
    table(out, columns, rows, everything=everything)


def kinds_of(space: WeightSpace, group: Group) -> str:
    """The kinds of symmetry of a group, gauges included, on one line."""
    gauges = [g.kind for g in space.gauges if g.group == group.name]
    return ", ".join(dict.fromkeys([*group.kinds, *gauges]))


def elements_moved(space: WeightSpace, group: str) -> tuple[int, int]:
    """How many parameters a group moves, and how many elements they have; buffers aside."""
    moved = [
        p
        for p in space.params
        if not p.buffer
        and (
            any(g.name == group for axis in p.axes for g in axis.groups())
            or (p.at is not None and p.at[0] == group)
        )
    ]
    return len(moved), sum(p.numel for p in moved)


def params_table(out: Console, space: WeightSpace, *, everything: bool = False) -> None:
    """The parameters and buffers with the groups that index them (``!`` marks fixed ones)."""
    mixed = len({p.dtype for p in space.params}) > 1
    narrow = out.width < 100
    rows = [
        [
            named(p, narrow),
            f"({', '.join(map(str, p.axes))})",
            p.role.value,
            p.dtype if mixed else "",
            "" if narrow else count(p.numel),
            "buffer" if p.buffer and not narrow else "",
        ]
        for p in space.params
    ]
    columns = ["parameter", "axes", "role", "dtype", ">elements", "kind"]
    table(out, columns, rows, everything=everything)


def named(p: Param, narrow: bool) -> Text:
    """A parameter's name with its ties; on a narrow screen long ones break at their dots."""
    width = 36 if narrow else 10**4
    text = Text(fold(p.name, width))
    for tie in p.ties:
        text.append("\n= " + fold(tie, width - 2), "dim")
    return text


def fold(name: str, width: int) -> str:
    """A dotted name on lines of at most this width, broken after dots where it has any."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1].strip() and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def by_group(out: Console, space: WeightSpace, *, everything: bool = False) -> None:
    """Each group with the parameters it indexes."""
    rows: list[list[str | Text]] = []
    for g in space.groups.values():
        for i, p in enumerate(
            p for p in space.params if g in (x for a in p.axes for x in a.groups())
        ):
            first = Text(g.name, "cyan") if i == 0 else ""
            rows.append([first, f"{g.size:,}" if i == 0 else "", str(p)])
    table(out, ["group", ">size", "indexes"], rows, everything=everything)


def nonfinite_text(counts: Mapping[str, int]) -> Text | str:
    """A warning about NaN or infinite weights; empty if there are none."""
    if not counts:
        return ""
    names = [f"{name} ({number:,})" for name, number in counts.items()]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    total = plural(sum(counts.values()), "element")
    return Text(f"{total} NaN or infinite: {', '.join(names[:8])}{more}", "bold red")


def write_json(out: Console, target: str, data: Mapping[str, Any]) -> None:
    """Writes JSON to a file, all of it or nothing; ``-`` stands for standard output.

    Args:
        out: Console that ``-`` means.
        target: File, or ``-``.
        data: What to write.
    """
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    if target == "-":
        out.file.write(text)
        return
    write_whole(Path(target), text.encode())
    out.print(Text(f"wrote {target}"), soft_wrap=True)
