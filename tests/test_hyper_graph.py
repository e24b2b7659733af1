"""Graph hypernetworks: what is predicted, how large, where it depends on what, and files."""

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import wspace
from datasets_zoo import architectures as zoo
from datasets_zoo.images import standardised
from wspace.errors import CheckpointError, HyperError, SpaceMismatch
from wspace.hyper.graph import (
    GraphHyperNetwork,
    UnitCodes,
    architecture_of,
    channel_diversity,
    coverage_of,
    fit_shape,
    ghn_card,
    load_ghn,
    predict_into,
    save_ghn,
    weight_norms,
    with_noise,
)
from wspace.hyper.graph.body import batched
from wspace.hyper.graph.decoder import TileDecoder, Wanted
from wspace.hyper.graph.fit import tap_index, tile_index
from wspace.hyper.graph.form import forms_of
from wspace.space import WeightSpace
from wspace.testing import assert_close, assert_same

BODIES = ("graphormer", "gated", "none")
IMAGE = (2, 1, 8, 8)
NETS = {
    "mlp": lambda: zoo.mlp(64, (18, 41), 10),
    "cnn": lambda: zoo.cnn(1, (5, 38, 7), kernel=5, norm=True),
    "plain": lambda: zoo.plain(1, (6, 9), (2, 1), norm=False),
    "resnet": lambda: zoo.resnet(1, (6, 11), blocks=2),
    "depthwise": lambda: zoo.depthwise(1, 13, 2),
    "vit": lambda: zoo.vit(1, 8, width=12, blocks=2, heads=3),
}


def small(**options: Any) -> GraphHyperNetwork:
    torch.manual_seed(0)
    return GraphHyperNetwork(16, 2, 2, **{"channels": 12, "hidden": 24, **options}).double()


def built(name: str) -> tuple[nn.Module, WeightSpace]:
    torch.manual_seed(1)
    module = NETS[name]().eval()
    return module, wspace.trace(module, torch.zeros(IMAGE))


OTHERS = (
    "autoencoder_tied moe_averaged lstm wide_deep vgg densenet mobilenet_v3 grouped_se conv3d "
    "prelu gpt2 unused_parameters siren mlp_rmsnorm_gelu maxout"
).split()
SOME = [pytest.param(n, marks=[] if n in OTHERS else pytest.mark.slow) for n in sorted(CASES)]

SPACES = {name: built(name)[1] for name in NETS}


def state_of(ghn: GraphHyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    made = ghn(space)
    assert isinstance(made, dict)
    return {name: x.detach() for name, x in made.items()}


# --- everything is predicted, once ----------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_every_parameter_of_any_module_is_predicted(name: str) -> None:
    module, args, kwargs = CASES[name].build()
    space = wspace.trace(module, args, kwargs)
    with torch.no_grad():
        made = state_of(small(), space)
    real = dict(module.named_parameters(remove_duplicate=False))
    shapes = {k: tuple(x.shape) for k, x in real.items() if x.is_floating_point()}
    assert {k: tuple(x.shape) for k, x in made.items()} == shapes
    count = sum(x.numel() for x in module.parameters() if x.is_floating_point())
    assert coverage_of(space).numel == count
    assert sum(x.numel() for x in {x.data_ptr(): x for x in made.values()}.values()) == count
    assert all(bool(x.isfinite().all()) for x in made.values())
    for form in forms_of(space):  # every entry of a form is at one place of the parameter
        x = torch.arange(prod(form.shape)).reshape(form.shape)
        assert_same(form.place(form.canonical(x)), x)


def test_ties_are_one_tensor_and_statistics_are_said_to_be_kept() -> None:
    module, args, kwargs = CASES["gpt2"].build()
    made = state_of(small(), wspace.trace(module, args, kwargs))
    assert made["lm_head.weight"].data_ptr() == made["transformer.wte.weight"].data_ptr()
    found = coverage_of(SPACES["cnn"])
    assert [name for name in found.kept if "running" in name] == list(found.kept)
    assert "kept 1.running_mean: a buffer" in str(found)
    assert found.numel == found.total == sum(x.numel() for x in built("cnn")[0].parameters())


def test_a_space_written_by_hand_is_refused() -> None:
    space = SPACES["mlp"]
    bare = WeightSpace(space.params, space.gauges)
    with pytest.raises(SpaceMismatch, match="has no wiring"):
        small()(bare)


def test_unknown_bodies_are_refused() -> None:
    with pytest.raises(HyperError, match="no body 'mamba'"):
        GraphHyperNetwork(body="mamba")  # type: ignore[arg-type]


# --- forms ----------------------------------------------------------------------------------------


def test_forms_know_ends_and_taps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = nn.Conv2d(2, 6, (3, 5)), nn.Conv2d(6, 6, 3, groups=6)
            self.flat = nn.Linear(6 * 4, 7)
            self.last = nn.Parameter(torch.randn(7, 4))  # stored (in, out)

        def forward(self, x: Tensor) -> Tensor:
            y = self.deep(self.conv(x)).relu()
            return self.flat(y.flatten(1)).tanh() @ self.last

    space = wspace.trace(Net(), torch.zeros(1, 2, 6, 8))
    forms = {f.name: f for f in forms_of(space)}
    sizes = {name: f.sizes for name, f in forms.items()}
    assert sizes["conv.weight"] == (6, 2, 3, 5)
    assert sizes["deep.weight"] == (6, 1, 3, 3)
    assert sizes["flat.weight"] == (7, 6, 4)
    assert sizes["last"] == (4, 7)
    assert sizes["flat.bias"] == (7, 1)
    fans = {n: f.fan_in for n, f in forms.items() if not f.vector}
    assert fans == {"conv.weight": 30, "deep.weight": 9, "flat.weight": 24, "last": 7}
    assert forms["deep.weight"].gain == 1 and forms["conv.weight"].gain == 2
    w = torch.randn(7, 24)
    assert_same(forms["flat.weight"].canonical(w)[2, 3, 1], w[2, 3 * 4 + 1])
    assert_same(forms["last"].canonical(w[:, :4])[3, 5], w[5, 3])


# --- fit_shape ------------------------------------------------------------------------------------


def by_hand(tile: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Entry by entry."""
    out, into, *taps = sizes
    c, s = tile.shape[0], tile.shape[-1]
    made = torch.zeros(sizes, dtype=tile.dtype)
    for o in range(out):
        for i in range(into):
            for number, place in enumerate(_places(taps)):
                if len(taps) > 2 or (len(taps) == 1 and taps[0] > s):
                    row, column = divmod(number % (s * s), s)
                else:
                    whole = (*[0] * (2 - len(taps)), *place)
                    lengths = (*[1] * (2 - len(taps)), *taps)
                    row, column = (
                        k % s if n > s else (s - n) // 2 + k
                        for k, n in zip(whole, lengths, strict=True)
                    )
                made[(o, i, *place)] = tile[o % c, i % c, row, column]
    return made


def _places(taps: list[int]) -> Iterator[tuple[int, ...]]:
    return iter([tuple(x) for x in torch.cartesian_prod(*map(torch.arange, taps)).reshape(
        -1, len(taps)).tolist()] if taps else [()])  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [(3, 4), (9, 2), (4, 11, 3), (5, 3, 1, 1), (2, 7, 3, 3), (3, 1, 2, 5), (3, 2, 7, 4), (1, 1, 9),
     (2, 3, 30), (2, 2, 3, 2, 4), (13, 6, 5, 5)],
)  # fmt: skip
def test_fit_shape_is_the_map_of_a_naive_loop(sizes: tuple[int, ...]) -> None:
    tile = torch.randn(4, 4, 5, 5)
    assert_same(fit_shape(tile, sizes), by_hand(tile, sizes))
    batch = torch.stack([tile, 2 * tile])
    assert_same(fit_shape(batch, sizes), torch.stack([by_hand(t, sizes) for t in batch]))


def test_by_hand_finds_a_wrong_map() -> None:
    tile = torch.randn(4, 4, 5, 5)
    assert not torch.equal(
        fit_shape(tile, (2, 7, 3, 3)), tile[:2, :, :3, :3].repeat(1, 2, 1, 1)[:, :7]
    )


def test_fit_shape_refuses_what_is_no_shape() -> None:
    with pytest.raises(HyperError, match=r"got \(3, 0\)"):
        fit_shape(torch.zeros(2, 2, 3, 3), (3, 0))


def test_index_maps() -> None:
    assert tile_index(3, 7, centred=True).tolist() == [2, 3, 4]
    assert tile_index(3, 7).tolist() == [0, 1, 2]
    assert tile_index(5, 3, centred=True).tolist() == [0, 1, 2, 0, 1]
    assert tap_index((), 5).tolist() == [12]
    assert tap_index((3,), 5).tolist() == [11, 12, 13]
    assert tap_index((2, 2), 3).tolist() == [0, 1, 3, 4]


def test_the_decoder_decodes_only_what_fit_shape_would_take() -> None:
    torch.manual_seed(0)
    decoder = TileDecoder(8, 12, hidden=10, codes=False).double()
    states = torch.randn(3, 8, dtype=torch.float64)
    for space in SPACES.values():
        for form in architecture_of(space).forms:
            if form.kind != "matrix":
                continue
            (made,) = decoder(states, [Wanted(form, 1)])
            x = torch.relu(decoder.taps(decoder.norm(states)[1])).unflatten(0, (25, -1))
            tile = decoder.tile(torch.relu(decoder.mix(x))).unflatten(-1, (12, 12))
            naive = fit_shape(tile.movedim(0, -1).unflatten(-1, (5, 5)), form.sizes)
            naive = naive / naive.square().mean().sqrt() * form.deviation
            assert_close(made, form.place(naive))


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_fan_in_variance_at_the_start(name: str) -> None:
    made = state_of(small(), SPACES[name])
    seen = 0
    for form in architecture_of(SPACES[name]).forms:
        x = made[form.name]
        if form.kind == "matrix":
            assert float(x.square().mean()) * form.fan_in / form.gain == pytest.approx(1, rel=1e-3)
            seen += 1
        elif form.kind == "scale":
            assert float(x.min()) > 0 and float(x.max()) < 2
        elif form.kind == "shift":
            assert float(x.abs().max()) < 1
    assert seen > 1


def test_variance_of_large_tensors_about_their_mean() -> None:
    torch.manual_seed(0)
    space = wspace.trace(zoo.mlp(64, (80, 90), 10), torch.zeros(IMAGE))
    made = state_of(GraphHyperNetwork(), space)
    for form in architecture_of(space).forms:
        if form.kind == "matrix" and form.out.size > 16:
            ratio = float(made[form.name].var()) * form.fan_in / form.gain
            assert ratio == pytest.approx(1, rel=0.05)


# --- what a prediction depends on -----------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", NETS)
def test_the_order_of_nodes_means_nothing(name: str, body: Any) -> None:
    ghn, graph = small(body=body), architecture_of(SPACES[name])
    order = torch.randperm(graph.size, generator=torch.Generator().manual_seed(3))
    (a,), (b,) = ghn.predict([graph]), ghn.predict([graph.permuted(order)])
    assert_close(a, b)


def test_a_permutation_of_the_distances_alone_is_seen() -> None:
    """Negative control: nodes are moved but what is known of them is not."""
    ghn, graph = small(), architecture_of(SPACES["resnet"])
    order = torch.randperm(graph.size, generator=torch.Generator().manual_seed(3))
    moved = graph.permuted(order)
    wrong = type(graph)(**{**vars(graph), "distances": moved.distances})
    (a,), (b,) = ghn.predict([graph]), ghn.predict([wrong])
    assert max(float((a[n] - b[n]).detach().abs().max()) for n in a) > 1e-4


@pytest.mark.parametrize("body", BODIES)
def test_a_batch_of_architectures_is_each_alone(body: Any) -> None:
    ghn = small(body=body)
    together = ghn([*SPACES.values()])
    for made, space in zip(together, SPACES.values(), strict=True):
        assert_close(state_of(ghn, space), made)


def test_equal_forms_of_different_shapes_are_put_in_place() -> None:
    """Linear layers, their transposes and convolutions of one tap are decoded together."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 1), nn.Linear(6, 6)
            self.c, self.d = nn.Parameter(torch.randn(6, 6)), nn.Conv1d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu().mean((2, 3))).relu() @ self.c
            return self.d(y.relu()[..., None])

    net = Net()
    space = wspace.trace(net, torch.zeros(2, 6, 3, 3))
    made = state_of(small(), space)
    assert {n: x.shape for n, x in made.items()} == {n: x.shape for n, x in net.named_parameters()}
    alone = small()
    graph = architecture_of(space)
    x = alone.body(alone.embedding(batch := batched([graph], torch.device("cpu"))), batch)[0]
    for form, row in zip(graph.forms, graph.holders.tolist(), strict=True):
        assert_close(alone.decoder(x, [Wanted(form, row)])[0].detach(), made[form.name])


@pytest.mark.parametrize("body", BODIES)
def test_equal_layers_at_different_places_differ(body: Any) -> None:
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(9, 9), nn.ReLU())])
    made = state_of(small(body=body), wspace.trace(net, torch.zeros(2, 9)))
    weights = [x for x in made.values() if x.dim() == 2]
    for i, a in enumerate(weights):
        for b in weights[:i]:
            assert float((a - b).abs().max()) > 1e-3


def test_parallel_branches_differ_though_nothing_tells_them_apart() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).relu() + self.b(x).relu())

    made = state_of(small(), wspace.trace(Twins(), torch.zeros(2, 5)))
    assert float((made["a.weight"] - made["b.weight"]).abs().max()) > 1e-3


def test_distances_are_shortest_paths() -> None:
    graph = architecture_of(SPACES["resnet"])
    step = graph.distances == 1
    far, reach = graph.distances, torch.eye(graph.size, dtype=torch.bool)
    for d in range(20):
        assert_same(far <= d, reach)
        reach = reach | (reach.int() @ step.int() > 0)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("codes", [True, False])
def test_gradients_reach_every_parameter(body: Any, codes: bool) -> None:
    """On networks wide enough for codes of units, pieces and places, and with norms."""
    ghn = small(body=body, codes=codes)
    spaces = [SPACES[n] for n in ("mlp", "cnn", "vit")]
    modules = [built(n)[0].double().train() for n in ("mlp", "cnn", "vit")]
    x, loss = torch.randn(IMAGE, dtype=torch.float64), torch.zeros(())
    for module, state in zip(modules, ghn(spaces), strict=True):
        loss = loss + functional_call(module, state, (x,)).square().sum()
    loss.backward()
    missing = [n for n, p in ghn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


# --- channels -------------------------------------------------------------------------------------


def test_codes_tell_repeated_channels_apart() -> None:
    space = SPACES["mlp"]  # hidden layers of 18 and 41 units, tiles of 12
    told, same = (channel_diversity(state_of(small(codes=c), space), space) for c in (True, False))
    assert told == {"1.weight": 1.0, "3.weight": 1.0, "5.weight": 1.0}
    assert same == {"1.weight": 12 / 18, "3.weight": 12 / 41, "5.weight": 1.0}


def test_noise_tells_them_apart_too() -> None:
    space, ghn = SPACES["mlp"], small(codes=False)
    before = state_of(ghn, space)
    g = torch.Generator().manual_seed(0)
    after = with_noise(before, space, 0.01, generator=g)
    assert set(channel_diversity(after, space).values()) == {1.0}
    assert_same(after["1.bias"], before["1.bias"])
    change = (after["3.weight"] - before["3.weight"]).square().mean().sqrt()
    assert float(change / before["3.weight"].square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)


def test_units_beyond_the_tile_have_codes_of_their_own() -> None:
    codes = UnitCodes(6, places=9, generator=torch.Generator().manual_seed(0))
    space = wspace.trace(
        nn.Sequential(nn.Linear(14, 20), nn.ReLU(), nn.Linear(20, 3)), torch.zeros(1, 14)
    )
    first, last = (f for f in architecture_of(space).forms if f.kind == "matrix")
    hidden = codes(first.out)
    assert_same(hidden[:6], torch.eye(6))
    assert len(torch.unique(hidden, dim=0)) == 20
    assert_same(hidden, codes(last.into))  # one group, one code, in whatever tensor
    assert_same(codes(first.into)[:9], codes.places)
    assert len(torch.unique(codes(first.into), dim=0)) == 14


def test_pieces_of_one_size_have_different_codes() -> None:
    """Queries, keys and values of a fused projection repeat the same units of a small tile."""
    ghn, space = small(channels=4), SPACES["vit"]
    made = state_of(ghn, space)["blocks.0.attention.qkv.weight"]
    assert len(torch.unique(made, dim=0)) == len(made) == 36


# --- into modules ---------------------------------------------------------------------------------


def test_predict_into_writes_everything() -> None:
    module, space = built("vit")
    ghn = small()
    found = predict_into(ghn, module, space)
    assert found.numel == sum(x.numel() for x in module.parameters())
    made = {k: x.detach().float() for k, x in state_of(ghn, space).items()}
    assert_same(dict(module.state_dict()), {k: made[k] for k in module.state_dict()})


def test_statistics_of_batchnorm_need_a_word() -> None:
    module, space = built("resnet")
    before = {k: x.clone() for k, x in module.state_dict().items()}
    with pytest.raises(HyperError, match="running statistics of BatchNorm are not predicted"):
        predict_into(small(), module, space)
    with pytest.raises(HyperError, match="expected batches, 'reset' or 'keep'"):
        predict_into(small(), module, space, batchnorm="new")  # type: ignore[arg-type]
    assert_same(dict(module.state_dict()), before)
    x = torch.randn(32, *IMAGE[1:])
    predict_into(small(), module, space, batchnorm=[x])
    assert not module.training
    with torch.no_grad():
        judged = module(x)
        in_batch = module.train()(x)
    # running variances are unbiased, those of a batch are not
    assert float((judged - in_batch).abs().max() / in_batch.abs().max()) < 0.1
    predict_into(small(), module, space, batchnorm="reset")
    assert float(module.state_dict()["1.running_mean"].abs().max()) == 0


def test_predict_into_is_all_or_nothing() -> None:
    module, space = built("resnet")
    module.get_parameter("8.bias").data.fill_(3.0)
    before = {k: x.clone() for k, x in module.state_dict().items()}

    def broken() -> Iterator[Tensor]:
        yield torch.randn(IMAGE)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        predict_into(small(), module, space, batchnorm=broken)
    assert_same(dict(module.state_dict()), before)
    with pytest.raises(HyperError, match="'8.weight' of shape"):
        predict_into(small(), zoo.resnet(1, (6, 12), blocks=2), space, batchnorm="keep")
    ghn = small()
    with torch.no_grad():
        ghn.decoder.gain.bias.fill_(torch.nan)
    with pytest.raises(HyperError, match="not finite"):
        predict_into(ghn, module, space, batchnorm="keep")
    assert_same(dict(module.state_dict()), before)


# --- the rest -------------------------------------------------------------------------------------


def test_norms_count_ties_once() -> None:
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])
    assert float(weight_norms({"a": x, "tied": x, "b": y})) == 7.0


def test_files(tmp_path: Any) -> None:
    torch.manual_seed(0)
    ghn = GraphHyperNetwork(16, 1, 2, channels=8, hidden=16)
    save_ghn(ghn, tmp_path / "a.safetensors", card={"seed": 0})
    again = load_ghn(tmp_path / "a.safetensors")
    assert ghn_card(tmp_path / "a.safetensors") == {"seed": 0} and not again.training
    assert_same(dict(again.state_dict()), dict(ghn.state_dict()))
    assert_close(state_of(again, SPACES["vit"]), state_of(ghn, SPACES["vit"]))
    save_ghn(ghn, tmp_path / "b.safetensors", half=True)
    size = [(tmp_path / f"{n}.safetensors").stat().st_size for n in "ab"]
    assert size[1] < 0.6 * size[0]
    assert load_ghn(tmp_path / "b.safetensors").decoder.gain.weight.dtype == torch.float32
    (tmp_path / "c.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is not a graph hypernetwork"):
        load_ghn(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="or a name"):
        load_ghn("ghn-huge")


@torch.no_grad()
def test_the_shipped_one_predicts_networks_that_recognise_digits() -> None:
    """Architectures, and even a data set, that it was not trained on."""
    data = standardised("digits")
    x = F.interpolate(data.test_x, size=10, mode="bilinear")
    x = F.pad(x, (2, 2, 2, 2), value=float(data.test_x.min()))  # as MNIST has digits
    x = (x - x.mean()) / x.std()
    nets = [
        zoo.resnet(1, (12, 20), stem=2),
        zoo.plain(1, (14, 18, 26), (2, 1, 2)),
        zoo.mlp(196, (40,)),
    ]
    ghn, right = load_ghn("ghn-small"), []
    for net in nets:
        state = state_of(ghn, wspace.trace(net.eval(), x[:2]))
        answers = functional_call(net.train(), state, (x,)).argmax(-1)
        right.append(float((answers == data.test_y).float().mean()))
    assert sum(right) / len(right) > 0.4, right
    assert ghn_card("ghn-small")["seed"] == 0
