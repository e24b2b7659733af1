"""Readers of published zoos, on tiny folders in exactly their layouts.

Every network that is read is run, and compared with its function written down with numpy in the
layout of the file.
"""

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from datasets_zoo.published import Published, import_zoo
from datasets_zoo.published.inr import DWSInr, NFNSiren
from datasets_zoo.published.model_zoo import ModelZooCNN
from datasets_zoo.published.recipe import READERS
from datasets_zoo.published.wild_park import WildCNN
from wspace.errors import ZooError
from wspace.zoo.recipe import Cohort, check_grouping

Array = np.ndarray


def only(kind: str, root: Path, **options: object) -> Cohort:
    recipe = Published(kind, str(root), **options)  # type: ignore[arg-type]
    assert recipe.cohorts == 1
    made = recipe.cohort(0)
    check_grouping(recipe, made.table)
    return made


def answers(cohort: Cohort, row: int, x: Array) -> Array:
    """Answer of one network that was read."""
    state = {name: value[row].double() for name, value in cohort.state.items()}
    module = cohort.architecture.module()
    with torch.no_grad():
        return functional_call(module, state, (torch.from_numpy(x),)).numpy()


def randomised(module: nn.Module, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=draw) for n, p in module.state_dict().items()}


def close(a: Array, b: Array) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


def conv(x: Array, kernel: Array, bias: Array, stride: int = 1, padding: int = 0) -> Array:
    """Convolution of (channels, height, width) with (out, in, height, width)."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    k = kernel.shape[-1]
    rows, cols = ((n - k) // stride + 1 for n in x.shape[1:])
    out = np.empty((len(kernel), rows, cols))
    for i in range(rows):
        for j in range(cols):
            patch = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.tensordot(kernel, patch, 3) + bias
    return out


def pool(x: Array) -> Array:
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2).max((2, 4))


def arrays(state: dict[str, Tensor]) -> dict[str, Array]:
    return {name: x.double().numpy() for name, x in state.items()}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- SIRENs ---------------------------------------------------------------------------------------


def dws_mnist(root: Path) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Four networks by (label, image), in the folders of DWSNets' MNIST."""
    states = {}
    places = {(7, 12): "training", (0, 3): "training", (7, 5): "training", (2, 3): "testing"}
    for (label, image), part in places.items():
        folder = root / f"mnist_png_{part}_{label}_{image}" / "checkpoints"
        folder.mkdir(parents=True)
        states[label, image] = randomised(DWSInr((2, 5, 3, 1), 30.0), 100 * label + image)
        torch.save(states[label, image], folder / "model_final.pth")
    return states


def test_dws_mnist(tmp_path: Path, rng: np.random.Generator) -> None:
    states = dws_mnist(tmp_path)
    cohort = only("dws_inr", tmp_path)
    table = cohort.table
    found = list(zip(table["label"], table["image"], table["split"], strict=True))
    assert sorted(found) == [(0, 3, "train"), (2, 3, "test"), (7, 5, "train"), (7, 12, "train")]
    assert list(table["view"]) == [0] * 4
    x = rng.uniform(-1, 1, (6, 2))
    for row, (label, image, _) in enumerate(found):
        p = arrays(states[label, image])
        h = np.sin(30 * (x @ p["seq.0.weight"].T + p["seq.0.bias"]))
        h = np.sin(30 * (h @ p["seq.1.weight"].T + p["seq.1.bias"]))
        close(answers(cohort, row, x), h @ p["seq.2.weight"].T + p["seq.2.bias"] + 0.5)


def test_dws_list_of_splits(tmp_path: Path) -> None:
    dws_mnist(tmp_path)
    name = "/home/elsewhere/mnist_png_training_{}_{}/checkpoints/model_final.pth"
    splits = {
        "train": {"path": [name.format(7, 12)], "label": ["7"]},
        "val": {"path": [name.format(0, 3)], "label": ["0"]},
        "test": {"path": [], "label": []},
    }
    (tmp_path / "mnist_splits.json").write_text(json.dumps(splits))
    table = only("dws_inr", tmp_path).table
    assert {name: list(values) for name, values in table.items()} == {
        "label": [7, 0],
        "image": [12, 3],
        "view": [0, 0],
        "split": ["train", "val"],
    }
    splits["val"]["path"] = [name.format(1, 1)]
    (tmp_path / "mnist_splits.json").write_text(json.dumps(splits))
    with pytest.raises(ZooError, match=r"(?s)1 files of the list.*mnist_png_training_1_1"):
        Published("dws_inr", str(tmp_path), size=2).cohort(0)


def test_dws_fashion(tmp_path: Path) -> None:
    root = tmp_path / "fmnist_inrs"
    (root / "weights").mkdir(parents=True)
    for i in range(3):
        state: dict[str, object] = dict(randomised(DWSInr((2, 4, 4, 1), 30.0), i))
        torch.save(state | {"label": 9 - i}, root / "weights" / f"inr_{10 + i}.pth")
    splits = {
        "train": ["dataset/weights/inr_12.pth"],
        "val": ["dataset/weights/inr_10.pth"],
        "test": ["x/weights/inr_11.pth"],
    }
    (root / "splits.json").write_text(json.dumps(splits))
    table = only("dws_inr", root).table
    assert (table["label"], table["image"]) == ([7, 9, 8], [12, 10, 11])
    assert table["split"] == ["train", "val", "test"]


def test_a_network_of_another_shape_is_named(tmp_path: Path) -> None:
    dws_mnist(tmp_path)
    odd = next(tmp_path.rglob("*training_7_5/checkpoints/*.pth"))
    torch.save(randomised(DWSInr((2, 5, 4, 1), 30.0), 0), odd)
    with pytest.raises(ZooError, match=rf"(?s){odd}.*got seq.1.weight \(4, 5\)"):
        only("dws_inr", tmp_path)


def test_nfn(tmp_path: Path, rng: np.random.Generator) -> None:
    states = {}
    for folder, image in (
        ("randinit_smaller_3s", 0),
        ("randinit_smaller_1s", 45_001),
        ("randinit_smaller_1s", 60_000),
        ("randinit_smaller_aug4_3s", 0),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        states[folder, image] = randomised(NFNSiren((2, 3, 5, 2), 30.0), image)
        torch.save(states[folder, image], tmp_path / folder / f"net{image}.pth")
    cohort = only("nfn_siren", tmp_path)
    assert {name: list(values) for name, values in cohort.table.items()} == {
        "label": [3, 1, 1, 3],
        "image": [0, 45_001, 60_000, 0],
        "view": [0, 0, 0, 5],
        "split": ["train", "val", "test", "train"],
    }
    x, p = rng.uniform(-1, 1, (4, 2)), arrays(states["randinit_smaller_1s", 60_000])
    h = np.sin(30 * (x @ p["net.0.linear.weight"].T + p["net.0.linear.bias"]))
    h = np.sin(30 * (h @ p["net.1.linear.weight"].T + p["net.1.linear.bias"]))
    close(answers(cohort, 2, x), h @ p["net.2.weight"].T + p["net.2.bias"])


# --- Small CNN Zoo --------------------------------------------------------------------------------

LAYOUT = [
    ("sequential/conv2d/bias:0", (5,)),
    ("sequential/conv2d/kernel:0", (3, 3, 1, 5)),
    ("sequential/conv2d_1/bias:0", (4,)),
    ("sequential/conv2d_1/kernel:0", (3, 3, 5, 4)),
    ("sequential/dense/bias:0", (7,)),
    ("sequential/dense/kernel:0", (4, 7)),
]


def small_cnn_zoo(root: Path, rng: np.random.Generator) -> Array:
    """Two networks with two checkpoints each, and a third; the rows of weights."""
    start, lines = 0, []
    for name, shape in LAYOUT:
        size = int(np.prod(shape))
        lines.append([name, start, start + size, size, str(shape)])
        start += size
    with (root / "layout.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["varname", "start_idx", "end_idx", "size", "shape"], *lines])
    weights = rng.normal(size=(5, start)).astype(np.float32)
    np.save(root / "weights.npy", weights)
    names = ["config.activation", "config.dataset", "config.learning_rate", "config.w_init"]
    names += ["modeldir", "step", "test_accuracy"]
    rows = [
        ["relu", "cifar10", 0.1, "he", "a", 86, 0.5],
        ["tanh", "cifar10", 0.2, "he", "b", 0, 0.1],
        ["relu", "cifar10", 0.1, "he", "a", 1, 0.25],
        ["tanh", "cifar10", 0.2, "he", "b", 86, 0.75],
        ["relu", "cifar10", 0.3, "x", "c", 86, 1.0],
    ]
    with gzip.open(root / "metrics.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return weights


def tensorflow(row: Array, x: Array, act: object) -> Array:
    """The network on (height, width, channels), in TensorFlow's layout."""
    parts, start = [], 0
    for _, shape in LAYOUT:
        size = int(np.prod(shape))
        parts.append(row[start : start + size].astype(float).reshape(shape))
        start += size
    for bias, kernel in ((parts[0], parts[1]), (parts[2], parts[3])):
        n = (x.shape[0] - 3) // 2 + 1
        out = np.empty((n, n, kernel.shape[3]))
        for i in range(n):
            for j in range(n):
                patch = x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                out[i, j] = np.einsum("hwi,hwio->o", patch, kernel) + bias
        x = act(out)  # type: ignore[operator]
    return x.mean((0, 1)) @ parts[5] + parts[4]


def test_small_cnn_zoo(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = small_cnn_zoo(tmp_path, rng)
    recipe = Published("small_cnn_zoo", str(tmp_path))
    relu, tanh = (recipe.cohort(i) for i in range(recipe.cohorts))
    assert relu.architecture.options["activation"] == "relu"
    assert relu.architecture.inputs[0].shape == (1, 1, 32, 32)
    assert relu.table["network"] == [0, 0, 2] and tanh.table["network"] == [1, 1]
    assert relu.table["learning_rate"] == [0.1, 0.1, 0.3] and relu.table["step"] == [86, 1, 86]
    assert tanh.table["test_accuracy"] == [0.1, 0.75] and tanh.table["w_init"] == ["he", "he"]
    x = rng.normal(size=(9, 9, 1))
    image = x.transpose(2, 0, 1)[None]
    close(answers(relu, 1, image)[0], tensorflow(weights[2], x, lambda z: np.maximum(z, 0)))
    close(answers(tanh, 0, image)[0], tensorflow(weights[1], x, np.tanh))


def test_small_cnn_zoo_last(tmp_path: Path, rng: np.random.Generator) -> None:
    small_cnn_zoo(tmp_path, rng)
    recipe = Published("small_cnn_zoo", str(tmp_path), last=True, size=1)
    tables = [recipe.cohort(i).table for i in range(recipe.cohorts)]
    assert [(t["network"], t["step"]) for t in tables] == [([0], [86]), ([2], [86]), ([1], [86])]


def test_small_cnn_zoo_leaves_out_what_diverged(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = small_cnn_zoo(tmp_path, rng)
    weights[0, 3] = np.nan
    np.save(tmp_path / "weights.npy", weights)
    cohort = Published("small_cnn_zoo", str(tmp_path)).cohort(0)
    assert cohort.table["network"] == [0, 2] and len(cohort.state["dense.bias"]) == 2


def test_small_cnn_zoo_that_does_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = small_cnn_zoo(tmp_path, rng)
    np.save(tmp_path / "weights.npy", weights[:4])
    with pytest.raises(ZooError, match=r"(?s)do not fit.*5 rows of .* numbers"):
        only("small_cnn_zoo", tmp_path)
    layout = (tmp_path / "layout.csv").read_text()
    for wrong in ("__import__('os')", "(4, 8)", "7"):
        (tmp_path / "layout.csv").write_text(layout.replace("(4, 7)", wrong))
        with pytest.raises(ZooError, match=r"layout.csv (is no layout|cannot be read)"):
            Published("small_cnn_zoo", str(tmp_path), size=2).cohort(0)
    (tmp_path / "layout.csv").write_text(layout)
    for content in (b"step,modeldir\n1,a\n", b"step,modeldir\n1\n", b""):
        (tmp_path / "metrics.csv.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ZooError, match=r"metrics.csv.gz (lacks columns|cannot be read)"):
            Published("small_cnn_zoo", str(tmp_path), size=3).cohort(0)


# --- ModelZooDataset ------------------------------------------------------------------------------


def model_zoo(root: Path, design: str, channels: int, *, params: bool = True) -> dict[str, Tensor]:
    """Two networks; the second has checkpoints of epochs 0 and 2. Returns its last state."""
    dropout = design == "CNN3"
    state: dict[str, Tensor] = {}
    for number, epochs in enumerate([[1], [0, 2]]):
        trial = root / f"NN_tune_trainable_{number}"
        trial.mkdir(parents=True)
        config = {
            "model::type": design,
            "model::channels_in": channels,
            "model::nlin": "tanh",
            "model::dropout": 0.1 if dropout else 0.0,
            "model::init_type": "uniform",
            "optim::optimizer": "adam",
            "optim::lr": 0.0003 * (number + 1),
            "optim::wd": 0,
            "training::batchsize": 10,
            "seed": number + 1,
        }
        if params:
            (trial / "params.json").write_text(json.dumps(config))
        lines = [
            {
                "training_iteration": epoch,
                "test_acc": 0.25 * epoch,
                "test_loss": 2.0,
                "train_acc": 0.5 if epoch else -999,
                "train_loss": 1.0 if epoch else -999,
                "config": config,
            }
            for epoch in range(3)
        ]
        (trial / "result.json").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        for epoch in epochs:
            name = f"checkpoint_{epoch}" if number else f"checkpoint_{epoch:06d}"
            (trial / name).mkdir()
            state = randomised(ModelZooCNN(design, channels, "tanh", dropout), 10 * number + epoch)
            torch.save(state, trial / name / "checkpoints")
            torch.save({"state": {}}, trial / name / "optimizer")
    return state


@pytest.mark.parametrize("params", [True, False])
def test_model_zoo(tmp_path: Path, params: bool) -> None:
    model_zoo(tmp_path, "CNN", 1, params=params)
    table = only("model_zoo", tmp_path).table
    assert table["network"] == [0, 1, 1] and table["epoch"] == [1, 0, 2]
    assert table["test_accuracy"] == [0.25, 0.0, 0.5]
    assert np.isnan(table["train_accuracy"][1]) and table["train_accuracy"][2] == 0.5
    assert table["lr"] == [0.0003, 0.0006, 0.0006] and table["optimizer"] == ["adam"] * 3
    assert only("model_zoo", tmp_path, last=True).table["epoch"] == [1, 2]


def test_cnn_s(tmp_path: Path, rng: np.random.Generator) -> None:
    p = arrays(model_zoo(tmp_path, "CNN", 1))
    assert sum(x.size for x in p.values()) == 2464
    cohort, x = only("model_zoo", tmp_path), rng.normal(size=(1, 28, 28))
    h = np.tanh(pool(conv(x, p["module_list.0.weight"], p["module_list.0.bias"])))
    h = np.tanh(pool(conv(h, p["module_list.3.weight"], p["module_list.3.bias"])))
    h = np.tanh(conv(h, p["module_list.6.weight"], p["module_list.6.bias"])).ravel()
    h = np.tanh(p["module_list.9.weight"] @ h + p["module_list.9.bias"])
    close(answers(cohort, 2, x[None])[0], p["module_list.11.weight"] @ h + p["module_list.11.bias"])


def test_cnn_l(tmp_path: Path, rng: np.random.Generator) -> None:
    p = arrays(model_zoo(tmp_path, "CNN3", 3))
    assert sum(x.size for x in p.values()) == 10853
    cohort, h = only("model_zoo", tmp_path), rng.normal(size=(3, 32, 32))
    expected = h
    for i in (0, 4, 8):
        kernel, bias = p[f"module_list.{i}.weight"], p[f"module_list.{i}.bias"]
        expected = np.tanh(pool(conv(expected, kernel, bias)))
    expected = np.tanh(p["module_list.13.weight"] @ expected.ravel() + p["module_list.13.bias"])
    expected = p["module_list.16.weight"] @ expected + p["module_list.16.bias"]
    close(answers(cohort, 2, h[None])[0], expected)


def test_pickled_data_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.pt").write_bytes(b"")
    for path in (tmp_path, tmp_path / "dataset.pt"):
        with pytest.raises(ZooError, match=r"(?s)pickled with classes.*raw"):
            only("model_zoo", path)


# --- CNN Wild Park --------------------------------------------------------------------------------

CONFIG = {
    "n_layers": 3,
    "n_classes": 6,
    "channels": [3, 4, 2, 5],
    "kernel_size": [3, 5, 3],
    "stride": [1, 1, 1],
    "padding": [1, 2, 1],
    "residual": [-1, -1, 0],
    "activation": ["relu", "tanh", "none"],
}


@pytest.fixture
def omegaconf() -> Iterator[ModuleType]:
    """Modules with classes that are pickled as OmegaConf's are; gone again for the readers."""
    names = ("omegaconf", "omegaconf.dictconfig", "omegaconf.listconfig", "omegaconf.nodes")
    modules = {name: ModuleType(name) for name in names}
    for name, kind in zip(names[1:], ("DictConfig", "ListConfig", "AnyNode"), strict=True):
        setattr(modules[name], kind, type(kind, (), {"__module__": name}))
    sys.modules.update(modules)
    yield modules["omegaconf"]
    for name in names:
        sys.modules.pop(name, None)


def wrapped(value: object) -> object:
    """A value in the objects of `omegaconf`, with what they know beside it."""
    place, kind, inner = "nodes", "AnyNode", value
    if isinstance(value, dict):
        place, kind = "dictconfig", "DictConfig"
        inner = {name: wrapped(item) for name, item in value.items()}
    elif isinstance(value, list):
        place, kind, inner = "listconfig", "ListConfig", [wrapped(item) for item in value]
    node = getattr(sys.modules[f"omegaconf.{place}"], kind)()
    node._metadata = {"key": int, "parent": list}
    setattr(node, "_val" if kind == "AnyNode" else "_content", inner)
    return node


def wild_park(root: Path, pack: object = lambda config: config) -> dict[str, Tensor]:
    """Two networks of one architecture and one of another; returns the second's last state."""
    state: dict[str, Tensor] = {}
    shapes = {key: CONFIG[key] for key in ("stride", "padding", "residual", "activation")}
    other = CONFIG | {"activation": ["gelu", "tanh", "none"]}
    for name, epochs, config in (("c", [10], other), ("a", [20], CONFIG), ("b", [10, 20], CONFIG)):
        for epoch in epochs:
            folder = root / "cifar10_zooV2" / name / f"checkpoint_{epoch:06d}"
            folder.mkdir(parents=True)
            module = WildCNN([3, 4, 2, 5], [3, 5, 3], classes=6, **shapes)  # type: ignore[arg-type]
            state = randomised(module, epoch)
            content = {
                "model": state,
                "optimizer": {"state": {}, "param_groups": []},
                "config": pack(config),  # type: ignore[operator]
                "iteration": epoch,
                "last_result": {"test/acc": epoch / 100, "config": {"model": config}},
            }
            torch.save(content, folder / "checkpoint.pt")
    return state


def test_wild_park(tmp_path: Path, rng: np.random.Generator, omegaconf: ModuleType) -> None:
    p = arrays(wild_park(tmp_path, wrapped))
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        del sys.modules[name]
    recipe = Published("cnn_wild_park", str(tmp_path))
    gelu, cohort = sorted((recipe.cohort(i) for i in range(2)), key=lambda c: len(c.table["epoch"]))
    assert gelu.table["network"] == [2] and gelu.architecture.options["activation"][0] == "gelu"
    assert cohort.table["network"] == [0, 1, 1] and cohort.table["epoch"] == [20, 10, 20]
    assert cohort.table["test_accuracy"] == [0.2, 0.1, 0.2] and cohort.table["split"] == [""] * 3
    x = rng.normal(size=(3, 8, 8))
    first = np.maximum(conv(x, p["layers.0.weight"], p["layers.0.bias"], padding=1), 0)
    h = np.tanh(conv(first, p["layers.1.weight"], p["layers.1.bias"], padding=2))
    h = conv(h, p["layers.2.weight"], p["layers.2.bias"], padding=1)
    h[:4] += first
    close(answers(cohort, 2, x[None])[0], p["fc.weight"] @ h.mean((1, 2)) + p["fc.bias"])
    assert "omegaconf" not in sys.modules


def test_wild_park_splits(tmp_path: Path) -> None:
    wild_park(tmp_path)
    name = "cifar10_zooV2/{}/checkpoint_{:06d}/checkpoint.pt"
    splits = {
        "train": {"path": [name.format("b", 10), name.format("b", 20)], "score": [0.1, 0.2]},
        "test": {"path": [name.format("a", 20)], "score": [0.2]},
    }
    (tmp_path / "cnn_park_splits.json").write_text(json.dumps(splits))
    recipe = Published("cnn_wild_park", str(tmp_path), last=True)
    tables = sorted((recipe.cohort(i).table for i in range(2)), key=lambda t: len(t["epoch"]))
    assert tables[0]["split"] == [""] and tables[1]["split"] == ["test", "train"]
    assert tables[1]["epoch"] == [20, 20]


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
def test_a_folder_without_a_zoo(kind: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ZooError, match=f"(?s)no {kind} in .*unpack"):
            only(kind, path)


def test_unknown_kind() -> None:
    with pytest.raises(ZooError, match=r"(?s)no such kind.*dws_inr"):
        only("dws", Path())


class Bomb:
    """What a hostile file would hold."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code was run",))


@pytest.mark.parametrize("content", ["code", "garbage", "list"])
def test_hostile_and_damaged_files_are_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dws_mnist(tmp_path / "dws")
    wild_park(tmp_path / "park")
    for kind, root in (("dws_inr", "dws"), ("cnn_wild_park", "park")):
        path = sorted(p for p in (tmp_path / root).rglob("*") if p.suffix in {".pt", ".pth"})[0]
        if content == "garbage":
            path.write_bytes(b"PK\x03\x04 nothing")
        else:
            torch.save({"seq.0.weight": Bomb()} if content == "code" else [1, 2], path)
        with pytest.raises(ZooError, match=str(path)):
            only(kind, tmp_path / root)
    assert capsys.readouterr().out == ""


def test_import_zoo(tmp_path: Path) -> None:
    dws_mnist(tmp_path / "source")
    zoo = import_zoo("dws_inr", tmp_path / "source", tmp_path / "zoo", size=3)
    assert len(zoo) == 4
    assert sorted(np.asarray(zoo.table["label"]).tolist()) == [0, 2, 7, 7]
    parts = zoo.split()
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "val": 0, "test": 1}
    assert all(report.ok for report in zoo.verify(2))
