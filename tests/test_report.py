"""Pictures and pages are valid, whole, self-contained, and show what they are given."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

import wspace
from wspace.errors import SpaceMismatch
from wspace.graph import ParameterGraph, encode
from wspace.report import Report, plot_graph, plot_space
from wspace.report.drawing import Drawing, Link, NodeSet, pooled, short
from wspace.report.graph import drawing_of
from wspace.report.page import write_whole
from wspace.report.paint import heatmaps, paint

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags that are open, text, and everything that is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def checked(text: str) -> Page:
    """A page that is well-formed and fetches nothing."""
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(|<script", text)
    return page


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).eval()


def graph_of(module: nn.Module, *inputs: torch.Tensor) -> ParameterGraph:
    return encode(wspace.trace(module, inputs), module.state_dict())


class Residual(nn.Module):
    """An addition, so that there is a link without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(*shape) for shape in ((3, 5), (5, 7), (7, 5), (5, 2))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.d(h + self.c(torch.relu(self.b(h))))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    ).eval()


# --- pages ------------------------------------------------------------------


def test_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    page = Report("Title & more", "lead <b>")
    page.heading("One").text("a < b", "second", tone="good").facts([("size", 7)])
    page.heading("Two").table(["name", "number"], [["w[0]", "1,234"], ["<i>", "2"]], caption="c")
    page.code("x = [1]\n<pre>").code("long", summary="fold")
    page.figure(heatmaps([("w", np.eye(3))]), 'cap "tion"')
    path = page.write(tmp_path / "page.html")
    found = checked(path.read_text(encoding="utf-8"))
    assert {"details", "summary", "table", "figure", "img", "nav"} <= set(found.tags)
    for text in ("Title & more", "lead <b>", "a < b", "w[0]", "<i>", "x = [1]\n<pre>", "fold"):
        assert text in found.words
    assert list(tmp_path.iterdir()) == [path]


def test_page_embeds_pictures_as_they_are(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    plot_graph(graph_of(mlp(2, 3, 1), torch.zeros(1, 2)), picture)
    (link,) = checked(Report("r").figure(picture, "c").html()).links
    head, data = link.split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == picture.read_bytes()


def test_numbers_stand_right() -> None:
    text = Report("r").table(["a", "b"], [["x", "1.5 s"], ["y", "20%"]]).html()
    assert '<th>a</th><th class="number">b</th>' in text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_text("old")
    with pytest.raises(TypeError, match="memoryview|bytes"):
        write_whole(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- pictures ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_graph_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"g{suffix}"
    figure = plot_graph(graph_of(conv(), torch.zeros(1, 2, 5, 5)), path, title="Net")
    data = path.read_bytes()
    if suffix == ".png":
        wide, tall = figure.get_size_inches() * 160
        assert abs(imread(path).shape[1] - wide) <= 1 and abs(imread(path).shape[0] - tall) <= 1
    elif suffix == ".html":
        assert "WeightSpace" in checked(data.decode()).words
    else:
        assert data.startswith(b"%PDF" if suffix == ".pdf" else b"<?xml")


def test_pictures_repeat_and_differ(tmp_path: Path) -> None:
    nets = {
        "a": (mlp(3, 5, 2), torch.zeros(1, 3)),
        "b": (mlp(3, 6, 2), torch.zeros(1, 3)),
        "c": (Residual().eval(), torch.zeros(1, 3)),
    }
    first = {}
    for name, (net, x) in nets.items():
        graph = graph_of(net, x)
        for turn in "12":
            plot_graph(graph, tmp_path / f"{name}{turn}.svg")
        first[name] = (tmp_path / f"{name}1.svg").read_bytes()
        assert first[name] == (tmp_path / f"{name}2.svg").read_bytes()
    assert len(set(first.values())) == len(nets)
    net = nets["a"][0]
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    plot_graph(graph_of(net, torch.zeros(1, 3)), tmp_path / "moved.svg")
    assert (tmp_path / "moved.svg").read_bytes() != first["a"]


def test_drawing_shows_units_weights_and_shortcuts() -> None:
    net = Residual().eval()
    drawing = drawing_of(graph_of(net, torch.zeros(1, 3)), "t")
    named = {link.label: link for link in drawing.links if link.label}
    assert set(named) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert sum(link.weight is None for link in drawing.links) == 1
    weight = named["b.weight"].weight
    assert weight is not None
    np.testing.assert_allclose(weight, net.b.weight.detach().T.double().numpy(), atol=1e-12)
    for link in drawing.links:
        assert drawing.sets[link.source].depth < drawing.sets[link.target].depth
    notes = {note for nodes in drawing.sets for note in nodes.notes}
    assert notes == {"a.bias", "b.bias", "c.bias", "d.bias"}


def test_drawing_sums_kernels_up() -> None:
    net = conv()
    drawing = drawing_of(graph_of(net, torch.zeros(1, 2, 5, 5)))
    (link,) = (link for link in drawing.links if link.label == "0.weight")
    kernels = net[0].weight.detach().double()
    strength = kernels.pow(2).mean((2, 3)).sqrt() * kernels.sum((2, 3)).sign()
    np.testing.assert_allclose(link.weight, strength.T.numpy(), rtol=1e-12)


def test_large_sets_are_boxes_and_cost_little(tmp_path: Path) -> None:
    net = mlp(300, 2000, 900, 10)
    graph = graph_of(net, torch.zeros(1, 300))
    figure = plot_graph(graph, tmp_path / "large.png")
    assert "h1 · 2,000" in {text.get_text() for text in figure.axes[0].texts}
    assert max(figure.get_size_inches()) < 12


def test_space_without_weights_is_drawn(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = mlp(3, 5, 2)
    plot_graph(wspace.trace(net, torch.zeros(1, 3)), tmp_path / "meta.svg")
    assert (tmp_path / "meta.svg").exists()


def test_space_without_wiring_is_refused() -> None:
    with pytest.raises(SpaceMismatch, match="no wiring"):
        plot_graph(wspace.WeightSpace(()))


def test_nan_does_not_spoil_a_picture(tmp_path: Path) -> None:
    net = mlp(3, 5, 2)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
        net[0].bias[0] = float("inf")
    plot_graph(graph_of(net, torch.zeros(1, 3)), tmp_path / "nan.png")


def test_plot_space(tmp_path: Path) -> None:
    space = wspace.trace(conv(), torch.zeros(1, 2, 5, 5))
    figure = plot_space(space, tmp_path / "space.png", title="Space")
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {"Space", "h1", "0.weight", "1.running_mean"} <= shown
    assert imread(tmp_path / "space.png").shape[0] > 100


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_graph(graph_of(mlp(2, 3, 1), torch.zeros(1, 2)), tmp_path / "g.svg")
    assert dict(mpl.rcParams) == before


# --- parts ------------------------------------------------------------------


def test_layers_cross_little() -> None:
    sets = [NodeSet(str(i), 2, d) for i, d in enumerate([0, 0, 1, 1])]
    links = [Link(0, 3), Link(1, 2)]
    top, bottom = Drawing("", sets, links).layers()
    assert [top.index(0), top.index(1)] == [bottom.index(3), bottom.index(2)]


def test_empty_drawing_is_drawn() -> None:
    assert paint(Drawing("nothing", [])).axes


def test_labels_do_not_overlap() -> None:
    """Texts of a picture of boxes, with attention's fan of three and a long shortcut."""
    rng = np.random.default_rng(0)
    sets = [NodeSet("h1", 48, 0, "h1", ("model.norm.weight", "b"))]
    sets += [NodeSet(f"h{i}", 48, 1, f"h{i}", ("a.long.name.of.a.bias",)) for i in (2, 3, 4)]
    sets += [NodeSet("h5", 48, 2), NodeSet("h1", 48, 3, "h1")] * 8
    sets[6:] = [NodeSet("h6", 99, 4 + i) for i in range(14)]
    name = "transformer.layers.{}.attention.projection.weight"
    links = [Link(0, i, name.format(i), rng.normal(size=(48, 48))) for i in (1, 2, 3)]
    links += [Link(i, 4) for i in (1, 2, 3)] + [Link(0, 5)]
    links += [
        Link(i, i + 1, name.format(i), rng.normal(size=(48, 48))) for i in range(4, len(sets) - 1)
    ]
    figure = paint(Drawing("Boxes", sets, links))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    page = figure.bbox
    for i, a in enumerate(boxes):
        assert page.x0 <= a.x0 and a.x1 <= page.x1 and page.y0 <= a.y0 and a.y1 <= page.y1
        for b in boxes[:i]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            up = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(across, up) < 2, "two texts overlap"


@pytest.mark.parametrize(
    ("name", "length", "want"),
    [
        ("0.weight", 20, "0.weight"),
        ("model.layers.11.weight", 12, "…11.weight"),
        ("averyveryverylongname", 8, "…averyv…"),
    ],
)
def test_short(name: str, length: int, want: str) -> None:
    assert short(name, length) == want


def test_pooled_keeps_signs_and_small_matrices() -> None:
    small = np.arange(6.0).reshape(2, 3)
    assert pooled(small, 4, 4) is small
    halves = pooled(np.array([[1.0, 3.0, -2.0, -4.0]]), 1, 2)
    np.testing.assert_allclose(halves, [[2.0, -3.0]])
