"""Heads: what each makes, entry by entry, and the laws that all of them keep."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from wspace.errors import HyperError
from wspace.hyper import (
    ChunkedHead,
    ComponentHead,
    FiLMHead,
    FullHead,
    Head,
    HyperNetwork,
    LowRankHead,
    MaskHead,
    PerTensorHead,
    RecurrentHead,
    TaskEmbedding,
    TiledHead,
    Weight,
)
from wspace.hyper.target import parameters_of, weights_of
from wspace.testing import TOLERANCE, assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")
TIGHT = TOLERANCE[torch.float64]
WIDTH = 5

HEADS: dict[str, Callable[[], Head]] = {
    "full": lambda: FullHead([9]),
    "linear": lambda: FullHead([]),
    "tensor": lambda: PerTensorHead([9]),
    "own": lambda: PerTensorHead([9], own=[8]),
    "chunk": lambda: ChunkedHead(17, [9], embedding=4),
    "some": lambda: ChunkedHead(17, [9], embedding=4, at_once=3),
    "recurrent": lambda: RecurrentHead(23, 6, embedding=4),
    "shape": lambda: ComponentHead([9], embedding=4),
    "role": lambda: ComponentHead([9], embedding=4, by="role"),
    "row": lambda: ComponentHead([9], embedding=4, by="row"),
    "low": lambda: LowRankHead(1, [9]),
    "film": lambda: FiLMHead([9]),
    "mask": lambda: MaskHead([9]),
    "hard": lambda: MaskHead([9], hard=True, deviation=3.0),
    "unit": lambda: MaskHead([9], by="unit"),
}


class Every(nn.Module):
    """A network with every kind of tensor: tied, of one dimension, normed, packed, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.directed = weight_norm(nn.Linear(4, 10))
        self.up = nn.ConvTranspose1d(10, 6, 3, stride=2, groups=2)
        self.down = nn.Conv1d(6, 8, 3, groups=2)
        self.batch = nn.BatchNorm1d(8)
        self.slope = nn.PReLU()
        self.back = weight_norm(nn.ConvTranspose1d(8, 6, 5, bias=False), dim=1)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.lstm(self.table(words))[0])
        x = self.directed(self.mix(x, x, x)[0])
        x = self.slope(self.batch(self.down(self.up(x.mT))))
        return self.out(self.back(x).mT)


def every() -> Every:
    """No parameter is zero, so that no change of one can hide."""
    made = Every()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


def weights(*shapes: Sequence[int]) -> list[Weight]:
    return [Weight(f"w{k}", tuple(s)) for k, s in enumerate(shapes)]


def bound(head: Head, made: Sequence[Weight], width: int = WIDTH) -> Any:
    head.bind(made, width)
    return head


def entries(made: Mapping[str, Tensor]) -> int:
    return sum(x.numel() for x in made.values())


# ------------------------------------------------------------------------ laws of all heads


@pytest.mark.parametrize("name", HEADS)
def test_without_scale_it_is_the_base(name: str) -> None:
    target, cond = every(), torch.tensor([[0, 2, 1], [3, 3, 0]])
    hyper = HyperNetwork(target, TaskEmbedding(4, WIDTH), HEADS[name](), "frozen", init="residual")
    hyper.scale = 0.0
    state = hyper(cond)
    for n, x in target.state_dict().items():
        assert_same(x.expand(2, 3, *x.shape), state[n])
    hyper.scale = 1.0  # the control: now every generated tensor is another
    state = hyper(cond)
    own = {w.name: target.get_parameter(w.name) for w in hyper.weights}
    same = [n for n, x in own.items() if torch.equal(state[n][0, 0], x)]
    assert name == "hard" or same == []


@pytest.mark.parametrize("name", HEADS)
def test_it_begins_as_the_base_and_learns(name: str) -> None:
    target, words = every(), torch.randint(11, (3, 2, 7))
    hyper = HyperNetwork(target, TaskEmbedding(4, WIDTH), HEADS[name](), "frozen", init="bias")
    made = hyper.generate(torch.tensor([0, 3]))
    for w in hyper.weights:
        assert_same(target.get_parameter(w.name).expand(2, *w.shape), made[w.name])
    hyper.run(torch.tensor([0, 1, 3]), words).square().mean().backward()
    grads = [p.grad for p in hyper.head.parameters() if p.grad is not None]
    assert max(g.abs().max() for g in grads) > 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_conditions_of_a_batch_are_independent(name: str) -> None:
    cond = torch.tensor([[0, 2, 1], [3, 3, 0]])
    hyper = HyperNetwork(every(), TaskEmbedding(4, WIDTH), HEADS[name](), "trained",
                         init="residual")  # fmt: skip
    together = hyper.generate(cond)
    for i, j in product(range(2), range(3)):
        alone = hyper.generate(int(cond[i, j]))
        assert_close(alone, {n: x[i, j] for n, x in together.items()})
    assert {n: x.shape[2:] for n, x in together.items()} == {w.name: w.shape for w in hyper.weights}
    assert any(not torch.equal(x[0, 0], x[0, 1]) for x in together.values())


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_learns(name: str) -> None:
    hyper = HyperNetwork(every(), TaskEmbedding(3, WIDTH), HEADS[name](), "trained",
                         init="residual")  # fmt: skip
    hyper.run(torch.tensor([0, 1, 2]), torch.randint(11, (3, 2, 7))).square().mean().backward()
    silent = [n for n, p in hyper.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", [n for n in HEADS if n not in {"film", "mask", "hard", "unit"}])
def test_without_a_base_lengths_and_scales_begin_right(name: str) -> None:
    hyper = HyperNetwork(every(), TaskEmbedding(3, WIDTH), HEADS[name]())
    made = hyper.generate(0)
    ones = [made[n] for n in ("norm.weight", "batch.weight")]
    lengths = made["directed.parametrizations.weight.original0"]
    assert max((x - 1).abs().max() for x in ones) < 0.2
    assert (lengths - 1).abs().max() < 0.2  # rows of variance 1 / fan-in, half from the bias
    back = made["back.parametrizations.weight.original0"]
    assert (back - 2**0.5).abs().max() < 0.2  # no bias: the whole variance


def test_modulations_need_a_base() -> None:
    for head in (FiLMHead([9]), MaskHead([9])):
        with pytest.raises(HyperError, match="changes values that are there"):
            HyperNetwork(every(), TaskEmbedding(3, WIDTH), head)
        fresh = bound(type(head)([9]), weights((3, 2)))
        with pytest.raises(HyperError, match="changes values that are there"):
            fresh(torch.zeros(WIDTH))


@pytest.mark.parametrize("name", ["full", "linear", "tensor", "low", "film", "mask"])
def test_heads_of_rows_need_a_condition(name: str) -> None:
    with pytest.raises(HyperError, match="needs a condition"):
        bound(HEADS[name](), weights((3, 2)), width=0)


@pytest.mark.parametrize("name", ["chunk", "recurrent", "shape", "role", "row"])
def test_heads_with_vectors_need_no_condition(name: str) -> None:
    hyper = HyperNetwork(every(), None, HEADS[name]())
    shapes = {w.name: w.shape for w in hyper.weights}
    assert {n: x.shape for n, x in hyper.generate().items()} == shapes
    hyper.run(None, torch.randint(11, (2, 7))).sum().backward()
    assert all(p.grad is not None for p in hyper.head.parameters())


# ------------------------------------------------------------------------ roles and fans


def test_fans_of_every_kind() -> None:
    net = every()
    found = {w.name: w for w in weights_of(net, {f.names[0] for f in parameters_of(net)})}
    fans = {n: (w.role.value, w.fan_in, w.fan_out, w.bias) for n, w in found.items()}
    direct, back = "directed.parametrizations.weight.", "back.parametrizations.weight."
    assert fans == {
        "table.weight": ("table", 1, 6, False),
        "lstm.weight_ih_l0": ("matrix", 6, 4, True),
        "lstm.weight_hh_l0": ("matrix", 4, 4, True),
        "lstm.bias_ih_l0": ("shift", 6, 4, True),
        "lstm.bias_hh_l0": ("shift", 4, 4, True),
        "norm.weight": ("scale", 1, 1, True),
        "norm.bias": ("shift", 1, 1, True),
        "mix.in_proj_weight": ("matrix", 4, 4, True),
        "mix.in_proj_bias": ("shift", 4, 4, True),
        "mix.out_proj.weight": ("matrix", 4, 4, True),
        "mix.out_proj.bias": ("shift", 4, 4, True),
        "directed.bias": ("shift", 4, 10, True),
        f"{direct}original0": ("scale", 4, 10, True),
        f"{direct}original1": ("matrix", 4, 10, True),
        "up.weight": ("matrix", 10 * 3 // 4, 9, True),  # groups 2, stride 2
        "up.bias": ("shift", 10 * 3 // 4, 9, True),
        "down.weight": ("matrix", 9, 12, True),
        "down.bias": ("shift", 9, 12, True),
        "batch.weight": ("scale", 1, 1, True),
        "batch.bias": ("shift", 1, 1, True),
        "slope.weight": ("other", 1, 1, False),
        f"{back}original0": ("scale", 40, 30, False),
        f"{back}original1": ("matrix", 40, 30, False),
        "out.bias": ("shift", 6, 11, True),
    }
    assert {n for n, w in found.items() if w.axis} == {
        "table.weight", "up.weight", f"{back}original0", f"{back}original1"}  # fmt: skip
    assert {n: w.spans for n, w in found.items() if w.spans} == {
        f"{direct}original0": 4, f"{back}original0": 40}  # fmt: skip
    assert found["directed.bias"].layer == found[f"{direct}original1"].layer == "directed"


# ------------------------------------------------------------------------ every entry's place


def assert_in_a_row(made: Mapping[str, Tensor], shapes: Sequence[Weight], values: Tensor) -> None:
    """Each entry is the one that counting says: offsets of tensors, then row-major inside."""
    offset = 0
    for w in shapes:
        for index in product(*map(range, w.shape)):
            place = 0
            for i, n in zip(index, w.shape, strict=True):
                place = place * n + i
            assert made[w.name][index] == values[offset + place], (w.name, index)
        offset += w.numel


SHAPES = ((3, 2), (3,), (2, 3, 4), (), (5, 1))


def test_full_head_reads_no_entry_of_another_tensor() -> None:
    head = bound(FullHead([4]), weights(*SHAPES))
    values = torch.randn(head.numel)
    with torch.no_grad():
        head.last.weight.zero_()
        head.last.bias.copy_(values)
    made = head(torch.randn(WIDTH))
    assert_in_a_row(made, head.weights, values)
    with pytest.raises(AssertionError):  # the control: a tensor that is too long shifts the others
        assert_in_a_row(made, [Weight("w0", (3, 2)), Weight("w2", (2, 3, 4))], values)


@pytest.mark.parametrize("chunk", [1, 4, 7, 39, 50])
def test_chunks_follow_each_other(chunk: int) -> None:
    every = weights(*SHAPES)
    count = -(-39 // chunk)
    head = bound(ChunkedHead(chunk, [], embedding=count), every)
    values = torch.randn(count * chunk)
    with torch.no_grad():
        head.chunks.copy_(torch.eye(count))
        head.last.weight.zero_()
        head.last.weight[:, WIDTH:] = values.view(count, chunk).T
    assert (head.count, head.numel) == (count, 39)
    assert_in_a_row(head(torch.randn(WIDTH)), every, values)


@pytest.mark.parametrize("by", ["shape", "row", "role"])
def test_components_have_their_places(by: Any) -> None:
    shapes = weights((3, 2), (3,), (4, 2), (3, 2), (5, 6), (4,), ())
    head = bound(ComponentHead([], embedding=40, by=by), shapes)
    families = head.families
    with torch.no_grad():
        head.vectors.copy_(torch.eye(40)[: len(head.vectors)])
        first = 0
        for family, last in zip(families, head.last, strict=True):
            last.weight.zero_()
            for k in range(sum(family.counts)):  # entry j of component c is 1000 c + j
                last.weight[:, WIDTH + first + k] = 1000 * (first + k) + torch.arange(
                    float(last.out_features)
                )
            first += sum(family.counts)
    made = head(torch.randn(WIDTH))
    assert list(made) == [w.name for w in shapes]
    component = 0
    for family in families:
        for w, count in zip(family.weights, family.counts, strict=True):
            for index in product(*map(range, w.shape)):
                inner = index[1:] if by == "row" and len(w.shape) > 1 else index
                place = 0
                for i, n in zip(inner, family.shape, strict=True):
                    place = place * n + i
                c = component + (index[0] if count > 1 else 0)
                assert made[w.name][index] == 1000 * c + place, (w.name, index)
            component += count
    sizes = {"shape": 6, "row": 5, "role": 3}  # (2,) and (6,) rows; (3,) (4,) () whole
    assert len(families) == sizes[by]


def test_tiles_lie_side_by_side() -> None:
    n_in, n_out, size = 2, 3, (2, 1)
    shapes = weights((6, 4, *size), (3, 6, *size), (3, 2, 5, 5))
    tiles = 4 + 3
    head = bound(TiledHead(tiles, basic=(n_in, n_out), hidden=tiles * n_in), shapes[:2], width=0)
    (kernels,) = head.kernels
    values = torch.randn(tiles, n_in, n_out, *size)
    with torch.no_grad():
        kernels.z.copy_(torch.eye(tiles))
        kernels.first.weight.zero_()
        for t, i in product(range(tiles), range(n_in)):
            kernels.first.weight[i * tiles * n_in + t * n_in + i, t] = 1.0
        kernels.last.weight.copy_(values.flatten(2).flatten(0, 1).T)
    made, first = head(torch.zeros(0)), 0
    for w in shapes[:2]:
        columns = w.shape[1] // n_in
        for o, i in product(range(w.shape[0]), range(w.shape[1])):
            tile = first + (o // n_out) * columns + i // n_in
            assert_same(values[tile, i % n_in, o % n_out], made[w.name][o, i])
        first += w.shape[0] * w.shape[1] // (n_in * n_out)


def test_low_rank_is_a_product() -> None:
    shapes = weights((6, 5), (7,), (8, 3, 3), (2, 2))
    head = bound(LowRankHead(2, [4]), shapes)
    assert head.shapes == [(6, 2), (5, 2), (7,), (8, 2), (9, 2), (2, 2)]  # the last is small
    made, parts = head(e := torch.randn(3, WIDTH)), head.made(e)
    for b in range(3):
        assert_close(parts[0][b] @ parts[1][b].T / 2**0.5, made["w0"][b])
        product_ = parts[3][b] @ parts[4][b].T / 2**0.5
        assert_close(product_.reshape(8, 3, 3), made["w2"][b])
        assert torch.linalg.matrix_rank(made["w2"][b].reshape(8, 9)) == 2
    assert_same(parts[5], made["w3"])


def test_film_scales_and_shifts_units() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Embedding(7, 2))
    hyper = HyperNetwork(net, TaskEmbedding(2, WIDTH), FiLMHead([4]), "frozen")
    pieces = dict(
        zip((w.name for w in hyper.weights), hyper.head.made(hyper.embed(1)), strict=True)
    )
    assert {n: tuple(x.shape) for n, x in pieces.items()} == {
        "0.weight": (4, 1), "0.bias": (4,), "1.weight": (1, 3, 1), "1.bias": (6,),
        "2.weight": (1, 2)}  # fmt: skip
    made = hyper.generate(1)
    x = torch.randn(5, 3)
    gamma, beta = pieces["0.weight"].squeeze(1), pieces["0.bias"]
    expected = (1 + gamma) * (x @ net[0].weight.T) + net[0].bias + beta
    assert_close(expected, x @ made["0.weight"].T + made["0.bias"])
    y = torch.randn(1, 4, 8)
    groups = (1 + pieces["1.weight"].flatten()).repeat(2)
    plain = nn.functional.conv_transpose1d(y, net[1].weight, groups=2)
    got = nn.functional.conv_transpose1d(y, made["1.weight"], groups=2)
    assert_close(plain * groups[:, None], got)
    assert_close(net[2].weight * (1 + pieces["2.weight"]), made["2.weight"])


@pytest.mark.parametrize("by", ["entry", "unit"])
def test_masks(by: Any) -> None:
    net = nn.Linear(3, 4)
    made: dict[bool, Tensor] = {}
    grads: dict[bool, Tensor] = {}
    tasks = TaskEmbedding(2, WIDTH)
    for hard in (False, True):
        g = torch.Generator().manual_seed(3)
        head = MaskHead([6], by=by, hard=hard, start=1.5, deviation=2.0)
        hyper = HyperNetwork(net, tasks, head, "frozen", generator=g)
        made[hard] = hyper.generate(1)["weight"]
        (grads[hard],) = torch.autograd.grad(made[hard].sum(), hyper.head.last.weight)
        x = hyper.head.made(hyper.embed(1))[0]
    soft = torch.sigmoid(x + 1.5) / torch.sigmoid(torch.tensor(1.5))
    assert_close((net.weight * soft).detach(), made[False].detach())
    assert_same((net.weight * (x > -1.5)).detach(), made[True].detach())
    assert_close(grads[False], grads[True])
    assert 0 < int((x > -1.5).sum()) < x.numel()
    far = hyper.head.merge(hyper.weights[0], torch.ones(4, 3), net.weight)
    assert not far.any()


def test_masks_stay_finite() -> None:
    head = bound(MaskHead([]), weights((2,)))
    with torch.no_grad():
        head.last.bias.copy_(torch.tensor([-1e4, 1e4]))
        head.last.weight.zero_()
    made = head(torch.zeros(WIDTH), {"w0": torch.ones(2)})["w0"]
    assert_close(torch.tensor([0.0, 1 + 2.718281828459045**-2]), made.detach())
    made.sum().backward()
    assert head.last.weight.grad.isfinite().all()


# ------------------------------------------------------------------------ counts, options


def test_tiled_counts_of_the_paper() -> None:
    def count(shapes: Sequence[Sequence[int]], embedding: int) -> tuple[int, int]:
        head = bound(TiledHead(embedding), weights(*shapes), width=0)
        return head.numel, sum(p.numel() for p in head.parameters())

    assert count([(16, 16, 7, 7)], 4) == (12_544, 4_240 + 4)
    for factor, tiles, kernels, total in ((1, 242, 557_568, 91_408), (2, 966, 2_225_664, 137_744)):
        shapes, before = [], 16
        for width in (16 * factor, 32 * factor, 64 * factor):
            shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 11]
            before = width
        assert count(shapes, 64) == (kernels, total)
        assert kernels == tiles * 16 * 16 * 9
        assert total == 64 * tiles + 64 * 65 * 16 + 9 * 16 * 65


def test_tiled_head_with_a_condition_and_two_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 3))
    hyper = HyperNetwork(net, TaskEmbedding(3, WIDTH), TiledHead(7, basic=(2, 2), hidden=5),
                         select="*.weight")  # fmt: skip
    assert len(hyper.head.kernels) == 2
    made = hyper.generate(torch.tensor([[0, 1]]))
    assert {n: tuple(x.shape) for n, x in made.items()} == {
        "0.weight": (1, 2, 6, 4, 3, 3), "1.weight": (1, 2, 4, 6, 1, 1),
        "2.weight": (1, 2, 2, 4, 3, 3)}  # fmt: skip
    assert_close(hyper.generate(1), {n: x[0, 1] for n, x in made.items()})
    assert not torch.equal(made["0.weight"][0, 0], made["0.weight"][0, 1])


def test_tiled_head_lists_what_it_cannot_make() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(16, 32, 3))
    with pytest.raises(
        HyperError, match=r"(?s)0\.weight.*0\.bias.*1\.weight.*1\.bias.*select="
    ) as e:
        HyperNetwork(net, None, TiledHead(8))
    assert "2.weight" not in str(e.value)


def test_maps_per_tensor_are_the_rows_of_the_full_head() -> None:
    shapes, e = weights(*SHAPES), torch.randn(3, WIDTH)
    full, parts = bound(FullHead([6]), shapes), bound(PerTensorHead([6]), shapes)
    with torch.no_grad():
        parts.trunk.load_state_dict(full.trunk.state_dict())
        rows = full.last.weight.split([w.numel for w in shapes])
        for w, block in zip(shapes, rows, strict=True):
            parts.maps[w.name].weight.copy_(block)
    assert_close(full(e), parts(e))


def test_own_layers_of_a_tensor_are_its_own() -> None:
    shapes, e = weights((3, 2), (4,)), torch.randn(3, WIDTH)
    head = bound(PerTensorHead([6], own=[7, 5]), shapes)
    before = head(e)
    h = head.trunk(e)
    for inner, shift in zip(head.inner, head.shifts, strict=True):
        h = (h @ inner[1].T + shift[1]).relu()
    assert_close(head.maps["w1"](h), before["w1"])
    with torch.no_grad():
        head.inner[0][1].mul_(2)
    assert_same(before["w0"], head(e)["w0"])
    assert not torch.equal(before["w1"], head(e)["w1"])


def test_chunks_made_in_parts_are_the_same() -> None:
    shapes, e = weights(*SHAPES), torch.randn(2, WIDTH)
    whole = bound(ChunkedHead(4, [6], embedding=3), shapes)
    parts = bound(ChunkedHead(4, [6], embedding=3, at_once=3), shapes)
    parts.load_state_dict(whole.state_dict())
    for head in (whole, parts):
        made = head(e)
        sum((x.sin() * (k + 1)).sum() for k, x in enumerate(made.values())).backward()
    assert_close(whole(e), parts(e))
    with torch.no_grad():
        assert_close(whole(e), parts(e))
    named = dict(parts.named_parameters())
    assert_close({n: p.grad for n, p in whole.named_parameters()},
                 {n: p.grad for n, p in named.items()})  # fmt: skip


@pytest.mark.parametrize("head", [lambda: ChunkedHead(0), lambda: RecurrentHead(4, 0)])
def test_sizes_are_positive(head: Callable[[], Head]) -> None:
    with pytest.raises(HyperError, match="sizes of at least 1"):
        head()


def test_options_that_do_not_exist() -> None:
    with pytest.raises(HyperError, match="unknown by='layer'"):
        ComponentHead(by="layer")  # pyright: ignore
    with pytest.raises(HyperError, match="cannot be made"):
        MaskHead(start=-1.0)
    with pytest.raises(HyperError, match="needs a rank"):
        LowRankHead(0)


# ------------------------------------------------------------------------ chunks in sequence


def flat(made: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(2, -1) for x in made.values()], -1)


def in_chunks(made: Mapping[str, Tensor], chunk: int) -> Sequence[Tensor]:
    return flat(made).split(chunk, -1)


def test_chunks_know_those_before_and_none_after() -> None:
    e = torch.randn(2, WIDTH)
    head = bound(RecurrentHead(7, 6, embedding=3), weights(*SHAPES))
    before = in_chunks(head(e), 7)
    for i in range(head.count):
        with torch.no_grad():
            old = head.chunks[i].clone()
            head.chunks[i] += 1.0
        after = in_chunks(head(e), 7)
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [j >= i for j in range(head.count)]
        with torch.no_grad():
            head.chunks[i] = old
    chunked = bound(ChunkedHead(7, [6], embedding=3), weights(*SHAPES))  # the control
    before = in_chunks(chunked(e), 7)
    with torch.no_grad():
        chunked.chunks[2] += 1.0
    changed = [not torch.equal(a, b) for a, b in zip(before, in_chunks(chunked(e), 7), strict=True)]
    assert changed == [j == 2 for j in range(chunked.count)]


def test_the_cell_is_an_lstm() -> None:
    e = torch.randn(2, WIDTH)
    head = bound(RecurrentHead(7, 6, embedding=3), weights(*SHAPES))
    (units,) = head.units
    cell = nn.LSTMCell(WIDTH + 3, 6)
    with torch.no_grad():
        cell.weight_ih.copy_(units.enter.weight)
        cell.bias_ih.copy_(units.enter.bias)
        cell.weight_hh.copy_(units.within.weight)
        cell.bias_hh.zero_()
    h, c = torch.zeros(2, 6), torch.zeros(2, 6)
    states, rows = head.states(e), []
    for i in range(head.count):
        h, c = cell(torch.cat([e, head.chunks[i].expand(2, -1)], -1), (h, c))
        assert_close(h, states[:, i])
        rows.append(units.leave(h) + head.shift)
    assert_close(torch.cat(rows, -1)[:, : head.numel], flat(head(e)))


@pytest.mark.parametrize("freeze", [True, False])
def test_growth_changes_nothing_at_first(freeze: bool) -> None:
    e = torch.randn(2, 3, WIDTH)
    head = bound(RecurrentHead(7, 6, embedding=3), weights(*SHAPES))
    before, old = head(e), list(head.parameters())
    new = [*head.grow(4, freeze=freeze), *head.grow(3, freeze=freeze)]
    assert_same(before, head(e))
    assert head.states(e).shape == (2, 3, head.count, 13)
    assert {id(p) for p in head.parameters()} == {id(p) for p in (*old, *new)}
    assert [p.requires_grad for p in old] == [not freeze] * len(old)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(x.square().sum() for x in head(e).values()).backward()
        optimizer.step()
    after = head(e)
    assert not any(torch.equal(before[n], after[n]) for n in before)
    assert new[-1].grad is not None


def test_growth_needs_units() -> None:
    with pytest.raises(HyperError, match="no unit was added"):
        bound(RecurrentHead(7), weights((3,))).grow(0)
    with pytest.raises(HyperError, match="no unit was added"):
        RecurrentHead(7).grow(2)
