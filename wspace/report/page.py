"""One self-contained HTML page: text, tables and figures, with nothing fetched from elsewhere."""

import base64
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #5c6575; --paper: #ffffff;
  --panel: #f5f6f9; --line: #dfe3ea; --accent: #2f5fb3; --good: #1a7f45; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ee; --dim: #9aa3b4; --paper: #15181f;
  --panel: #1d222c; --line: #333a47; --accent: #8ab0f5; --good: #63c98d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
.lead { color: var(--dim); font-size: 1.1rem; margin-bottom: 1.4rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; padding: 0; }
.facts div { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem .9rem; min-width: 9rem; }
.facts dt { color: var(--dim); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; overflow-x: auto; font: .82rem/1.5 ui-monospace, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-size: .92rem; }
th, td { text-align: left; padding: .35rem 1.3rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .6rem;
  border: 1px solid var(--line); border-radius: .6rem; }
figcaption, caption { color: var(--dim); font-size: .9rem; text-align: left; padding: .5rem 0;
  caption-side: bottom; max-width: 46rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
.good { color: var(--good); } .bad { color: var(--bad); }
nav a { color: var(--accent); text-decoration: none; margin-right: 1.1rem;
  white-space: nowrap; }
footer { margin-top: 3rem; color: var(--dim); font-size: .85rem; }
"""


class Report:
    """A page that is built from the top down and written as one file.

    All text is escaped, so names of parameters and messages may hold anything. Every method that
    adds something returns the page.

    Args:
        title: Heading of the page.
        lead: What the page is about, in a sentence.

    Example:
        >>> page = Report("A network").heading("Groups").table(["name", "size"], [["h1", 7]])
        >>> "<td>h1</td>" in page.html()
        True
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._lead = lead
        self._body: list[str] = []
        self._headings: list[str] = []

    def heading(self, text: str, *, level: int = 2) -> Self:
        """A heading; those of level 2 are linked at the top of the page."""
        if level == 2:
            self._headings.append(text)
            self._body.append(f'<h2 id="part{len(self._headings)}">{escape(text)}</h2>')
        else:
            self._body.append(f"<h{level}>{escape(text)}</h{level}>")
        return self

    def text(self, *paragraphs: str, tone: str = "") -> Self:
        """Paragraphs; the tone ``"good"`` or ``"bad"`` colours them."""
        mark = f' class="{escape(tone)}"' if tone else ""
        self._body += [f"<p{mark}>{escape(text)}</p>" for text in paragraphs]
        return self

    def code(self, text: str, *, summary: str = "") -> Self:
        """Preformatted text; with a summary it is folded away under it."""
        block = f"<pre>{escape(text)}</pre>"
        if summary:
            block = f"<details><summary>{escape(summary)}</summary>{block}</details>"
        self._body.append(block)
        return self

    def facts(self, facts: Iterable[tuple[str, object]]) -> Self:
        """A row of numbers to see first, each with its name."""
        cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts)
        self._body.append(f'<dl class="facts">{"".join(cells)}</dl>')
        return self

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = ""
    ) -> Self:
        """A table; columns that hold only numbers are aligned to the right."""
        cells = [[str(cell) for cell in row] for row in rows]
        numeric = [
            bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))
        ]
        marks = [' class="number"' if is_number else "" for is_number in numeric]
        head = "".join(f"<th{m}>{escape(c)}</th>" for m, c in zip(marks, columns, strict=True))
        body = "".join(
            f"<tr>{''.join(f'<td{m}>{escape(c)}</td>' for m, c in zip(marks, row, strict=True))}"
            "</tr>"
            for row in cells
        )
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._body.append(
            f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
        return self

    def figure(self, picture: "Path | str | Figure", caption: str, *, alt: str = "") -> Self:
        """A picture: a matplotlib figure (as SVG), or a ``.png`` or ``.svg`` file."""
        kind, data = _picture(picture)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        self._body.append(
            f'<figure><img src="{source}" alt="{escape(alt or caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
        return self

    def html(self) -> str:
        """The page as text."""
        lead = f'<p class="lead">{escape(self._lead)}</p>' if self._lead else ""
        links = " ".join(  # a blank, so that the row can wrap
            f'<a href="#part{i}">{escape(text)}</a>' for i, text in enumerate(self._headings, 1)
        )
        nav = f"<nav>{links}</nav>" if len(self._headings) > 1 else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self._title)}</h1>\n{lead}{nav}\n"
            + "\n".join(self._body)
            + "\n<footer>Made by wspace. This page needs nothing but itself.</footer>\n"
            "</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page: all of it or nothing.

        Args:
            path: File to write; its folder has to exist.

        Returns:
            The path.
        """
        return write_whole(path, self.html().encode())


def write_whole(path: str | Path, data: bytes) -> Path:
    """Writes a file beside its place first, so that a failure leaves the old one as it was.

    Args:
        path: File to write.
        data: Its content.

    Returns:
        The path.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        new.write_bytes(data)
        new.replace(path)
    return path


def figure_bytes(figure: "Figure", kind: str) -> bytes:
    """A figure in a format that matplotlib writes (``png``, ``svg``, ``pdf``), reproducibly."""
    from matplotlib import rc_context

    buffer = BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "wspace"}):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _picture(picture: "Path | str | Figure") -> tuple[str, bytes]:
    if isinstance(picture, str | Path):
        path = Path(picture)
        return ("svg+xml" if path.suffix == ".svg" else "png"), path.read_bytes()
    return "svg+xml", figure_bytes(picture, "svg")


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%").removesuffix(" s").replace(",", ""))
    except ValueError:
        return text in {"", "-"}
    return True
