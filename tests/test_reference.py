"""Models by name: built offline, in eval mode, with inputs that they run on."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, MissingExtra
from wspace.reference import Model, load_function, resolve

transformers: Any = pytest.importorskip("transformers")

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
TEXT = {name: VISION[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16, **TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        vocab_size=31,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def whisper() -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 5}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_source_positions": 7}
    config = transformers.WhisperConfig(
        vocab_size=31,
        max_target_positions=9,
        decoder_start_token_id=1,
        **sizes,
        **heads,
        **ends,
        **TOKENS,
    )
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {
        **TEXT,
        "intermediate_size": 20,
        "vocab_size": 31,
        "max_position_embeddings": 9,
        **TOKENS,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)
    return transformers.CLIPModel(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **TEXT,
        vocab_size=31,
        intermediate_size=24,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",
        **TOKENS,
    )
    return transformers.MixtralForCausalLM(config)


SHAPES = {
    gpt2: {"input_ids": (2, 7)},
    t5: {"input_ids": (2, 7), "decoder_input_ids": (2, 5)},
    vit: {"pixel_values": (2, 1, 8, 8)},
    whisper: {"input_features": (2, 5, 14), "decoder_input_ids": (2, 5)},
    clip: {"input_ids": (2, 7), "pixel_values": (2, 1, 8, 8)},
    mixtral: {"input_ids": (2, 7)},
}


def run(model: Model) -> Any:
    with torch.no_grad():
        return model.module(*model.args, **model.kwargs)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_hf_folder(tmp_path: Path, build: Callable[[], Any]) -> None:
    """The weights, inputs that run, no cache; ViT and Mixtral are stored under other names."""
    module = build()
    module.save_pretrained(tmp_path / "m")
    model = resolve(f"hf:{tmp_path / 'm'}")
    assert model.name == f"hf:{tmp_path / 'm'}"
    assert type(model.module) is type(module)
    assert not model.module.training
    assert_same(model.module.state_dict(), module.state_dict())
    assert model.checkpoint is not None
    assert_same(model.checkpoint, module.state_dict())
    assert {name: tuple(item.shape) for name, item in model.kwargs.items()} == SHAPES[build]
    assert getattr(run(model), "past_key_values", None) is None
    again = resolve(f"hf:{tmp_path / 'm'}")
    assert all(torch.equal(again.kwargs[name], item) for name, item in model.kwargs.items())


def test_hf_tokens_are_ordinary(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "m")
    ids = resolve(f"hf:{tmp_path / 'm'}").kwargs["input_ids"]
    assert not {0, 1, 2} & set(ids[:, :-1].flatten().tolist())
    assert ids[:, -1].tolist() == [2, 2]
    assert int(ids.max()) < 31


def test_hf_weights_on_demand(tmp_path: Path) -> None:
    module = gpt2()
    module.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    for reference, weights, loaded in [
        (file.parent, "auto", True),
        (file.parent, False, False),
        (file, "auto", False),
        (file, True, True),
    ]:
        model = resolve(f"hf:{reference}", weights=weights)
        assert (model.checkpoint is not None) is loaded
        weight = model.module.state_dict()["transformer.wte.weight"]
        assert torch.equal(weight, module.state_dict()["transformer.wte.weight"]) is loaded
    other = tmp_path / "llama.json"
    other.write_text(file.read_text())
    assert resolve(f"hf:{other}").checkpoint is None
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve(f"hf:{other}", weights=True)


def test_hf_on_meta(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "m")
    model = resolve(f"hf:{tmp_path / 'm'}", meta=True)
    assert all(item.is_meta for item in model.module.state_dict().values())
    assert not any(item.is_meta for item in model.kwargs.values())  # `wspace.trace` wants values
    assert model.checkpoint is not None
    assert not any(item.is_meta for item in model.checkpoint.values())
    mixtral().save_pretrained(tmp_path / "e")
    assert resolve(f"hf:{tmp_path / 'e'}", meta=True).checkpoint is None


def test_hf_without_architectures(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    for name in ("NoSuchClass", "pipeline", "TrainingArguments"):  # models only
        config["architectures"] = [name]
        file.write_text(json.dumps(config))
        assert type(resolve(f"hf:{file}").module) is transformers.GPT2Model


def test_hf_weights_of_another_model(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(CheckpointError, match=r"fit GPT2LMHead[\s\S]*missing .*h\.2\.ln_1"):
        resolve(f"hf:{tmp_path / 'm'}")


def test_hf_code_of_the_folder_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: ...\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="configuration .*config.json cannot be built"):
        resolve(f"hf:{tmp_path}")
    assert not trace.exists()


def test_hf_names_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "gpt2-small").mkdir()
    with pytest.raises(CheckpointError, match="did you mean 'gpt2-small'"):
        resolve(f"hf:{tmp_path / 'gpt2-smal'}")
    with pytest.raises(CheckpointError, match="hf download org/name"):
        resolve("hf:org/name")
    with pytest.raises(CheckpointError, match=r"there is no .*config.json"):
        resolve(f"hf:{tmp_path / 'gpt2-small'}")


def test_hf_without_known_inputs(tmp_path: Path) -> None:
    sizes = {"num_latents": 3, "d_latents": 8, "d_model": 8, "num_blocks": 1}
    parts = {"num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    config = transformers.PerceiverConfig(**sizes, **parts, architectures=["PerceiverModel"])
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no example inputs are known for Perceiver"):
        resolve(f"hf:{tmp_path / 'config.json'}")


# --- torchvision and timm -------------------------------------------------------------------------


class Net(nn.Module):
    """Stands in for a model of a library; keeps what it was built with."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.body = nn.Linear(3, 2)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision with the interface of the real one, and no models in it."""

    def plain(*, weights: object = "download", **rest: object) -> Net:
        return Net(weights=weights, **rest)

    def backboned(*, weights: object = "download", weights_backbone: object = "download") -> Net:
        return Net(weights=weights, weights_backbone=weights_backbone)

    def family(build: Callable[..., Net], module: str) -> Callable[..., Net]:
        def inner(**options: object) -> Net:
            return build(**options)

        inner.__module__ = f"torchvision.models.{module}"
        inner.__wrapped__ = build  # pyright: ignore
        return inner

    table = {
        "resnet18": family(plain, "resnet"),
        "inception_v3": family(plain, "inception"),
        "fcn_resnet50": family(backboned, "segmentation.fcn"),
        "fasterrcnn_resnet50_fpn": family(backboned, "detection.faster_rcnn"),
        "r3d_18": family(plain, "video.resnet"),
        "s3d": family(plain, "video.s3d"),
        "raft_small": family(plain, "optical_flow.raft"),
    }
    models: Any = ModuleType("torchvision.models")
    models.list_models = lambda: sorted(table)
    models.get_model_builder = lambda name: table[name.lower()]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.parametrize(
    ("name", "shapes", "options"),
    [
        ("resnet18", [(2, 3, 224, 224)], {"weights": None}),
        ("ResNet18", [(2, 3, 224, 224)], {"weights": None}),
        ("inception_v3", [(2, 3, 299, 299)], {"weights": None, "init_weights": True}),
        ("fcn_resnet50", [(2, 3, 224, 224)], {"weights": None, "weights_backbone": None}),
        ("r3d_18", [(1, 3, 8, 112, 112)], {"weights": None}),
        ("s3d", [(1, 3, 16, 224, 224)], {"weights": None}),
        ("raft_small", [(1, 3, 128, 128)] * 2, {"weights": None}),
    ],
)
@pytest.mark.usefixtures("torchvision")
def test_torchvision(name: str, shapes: list[tuple[int, ...]], options: dict[str, object]) -> None:
    model = resolve(f"torchvision:{name}")
    assert isinstance(model.module, Net)
    assert model.module.options == options
    assert not model.module.training
    assert [item.shape for item in model.args] == shapes
    meta = resolve(f"torchvision:{name}", meta=True)
    assert all(item.is_meta for item in meta.module.parameters())
    assert [bool(item.abs().sum()) for item in meta.args] == [True] * len(shapes)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_refuses() -> None:
    with pytest.raises(CheckpointError, match="fasterrcnn_resnet50_fpn detects objects"):
        resolve("torchvision:fasterrcnn_resnet50_fpn")
    with pytest.raises(CheckpointError, match=r"no model torchvision:resnet81[\s\S]*'resnet18'"):
        resolve("torchvision:resnet81")
    with pytest.raises(CheckpointError, match=r"names no weights[\s\S]*load_into"):
        resolve("torchvision:resnet18", weights=True)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm with the interface of the real one, and no models in it."""

    def create_model(name: str, *, pretrained: bool) -> Net:
        net: Any = Net(name=name, pretrained=pretrained)
        net.default_cfg = {"input_size": (3, 240, 240)} if "240" in name else {}
        return net

    module: Any = ModuleType("timm")
    module.list_models = lambda: ["resnet18", "vit_240"]
    module.is_model = lambda name: name in module.list_models()
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
def test_timm() -> None:
    for name, side in [("resnet18", 224), ("vit_240", 240), ("resnet18.a1_in1k", 224)]:
        model = resolve(f"timm:{name}")
        assert isinstance(model.module, Net)
        assert model.module.options == {"name": name, "pretrained": False}
        assert [item.shape for item in model.args] == [(2, 3, side, side)]
    with pytest.raises(CheckpointError, match=r"no model timm:resnet81[\s\S]*'resnet18'"):
        resolve("timm:resnet81")
    with pytest.raises(CheckpointError, match="no model timm:hf-hub:timm/resnet18"):
        resolve("timm:hf-hub:timm/resnet18")


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_missing_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match=rf"needs {name}\n.*pip install {name}"):
        resolve(f"{name}:resnet18")


# --- Python ---------------------------------------------------------------------------------------

CODE = """
from dataclasses import dataclass
import torch
from torch import nn
from beside import WIDTH
from wspace.reference import Model

@dataclass
class Options:
    width: "int" = WIDTH

class Method(nn.Linear):
    def example_inputs(self):
        return (torch.ones(2, 3),), {}

class Attribute(nn.Linear):
    example_inputs = torch.ones(2, 3)

class Named(nn.Linear):
    def example_inputs(self):
        return {"input": torch.ones(2, 3)}

class Strange(nn.Linear):
    example_inputs = [3]

class Space:
    @staticmethod
    def inner():
        return with_args()

def method(): return Method(3, Options().width)
def attribute(): return Attribute(3, 5)
def named(): return Named(3, 5)
def strange(): return Strange(3, 5)
def with_args(): return nn.Linear(3, 5), (torch.ones(2, 3),)
def with_kwargs(): return nn.Linear(3, 5), (), {"input": torch.ones(2, 3)}
def one_tensor(): return nn.Linear(3, 5), torch.ones(2, 3)
def model(): return Model("x", nn.Linear(3, 5), (torch.ones(2, 3),))
def bare(): return nn.Linear(3, 5)
def nothing(): return None
def triple(): return nn.Linear(3, 5), torch.ones(2, 3), 3
def needs(width, depth=2): return nn.Linear(width, 5)
def fails(): raise RuntimeError("no luck")
instance = Method(3, 5)
number = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "factories.py").write_text(CODE)
    return tmp_path / "factories.py"


@pytest.fixture(autouse=True)
def forget_modules() -> Any:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in {"beside", "factories", "_wspace_reference_factories"}:
            del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    "method attribute named with_args with_kwargs one_tensor model instance Space.inner".split(),
)
def test_py_file(code: Path, name: str) -> None:
    path = list(sys.path)
    model = resolve(f"py:{code}:{name}")
    assert model.name == f"py:{code}:{name}"
    assert not model.module.training
    assert run(model).shape == (2, 5)
    assert sys.path == path


@pytest.mark.parametrize("name", "bare strange with_args with_kwargs model instance".split())
def test_py_with_inputs_that_are_given(code: Path, name: str) -> None:
    given = (torch.ones(7, 3),)
    model = resolve(f"py:{code}:{name}", inputs=given)
    assert model.args is given and not model.kwargs and run(model).shape == (7, 5)


def test_py_module_of_the_working_directory(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code.parent)
    assert run(resolve("py:factories:with_args")).shape == (2, 5)
    model = resolve("py:factories.py:with_kwargs", meta=True)
    assert next(model.module.parameters()).is_meta
    assert model.kwargs["input"].shape == (2, 3)
    assert not model.kwargs["input"].is_meta


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bare", r"without example inputs[\s\S]*\(module, args, kwargs\)[\s\S]*got Linear"),
        ("nothing", r"returns something else[\s\S]*\(module, args\)[\s\S]*got NoneType"),
        ("triple", r"returns something else[\s\S]*got \(Linear, Tensor, int\)"),
        ("strange", r"inputs of another kind[\s\S]*got list"),
        ("needs", r"takes arguments[\s\S]*'width'[\s\S]*\(width, depth=2\)"),
        ("fails", r"cannot be built[\s\S]*RuntimeError: no luck"),
        ("number", r"is no function[\s\S]*got int"),
        ("with_arg", r"has no 'with_arg'[\s\S]*did you mean 'with_args'"),
    ],
)
def test_py_factories_that_do_not_do(code: Path, name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        resolve(f"py:{code}:{name}")


def test_py_files_that_do_not_do(code: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file [\s\S]*did you mean 'factories.py'"):
        resolve(f"py:{code.parent / 'factory.py'}:bare")
    with pytest.raises(CheckpointError, match="nowhere.at_all cannot be imported"):
        resolve("py:nowhere.at_all:make")
    with pytest.raises(CheckpointError, match="no factory is named"):
        resolve("py:factories")
    code.write_text("import missing_package\n")
    before = set(sys.modules)
    with pytest.raises(CheckpointError, match="cannot be imported[\\s\\S]*missing_package"):
        resolve(f"py:{code}:bare")
    assert set(sys.modules) == before


def test_schemes() -> None:
    with pytest.raises(CheckpointError, match=r"'tim'[\s\S]*torchvision:, timm:[\s\S]*'timm'"):
        resolve("tim:resnet18")
    for reference in ("resnet18", "hf:", ""):
        with pytest.raises(CheckpointError, match="expected one of hf:"):
            resolve(reference)


# --- functions ------------------------------------------------------------------------------------


def test_a_function_finds_what_is_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "beside_the_file.py").write_text("SEVEN = 7\n")
    (tmp_path / "measure.py").write_text(
        "def loss(module, scale=1):\n    from beside_the_file import SEVEN\n"
        "    return SEVEN * scale * module\n\nnumber = 3\n"
    )
    before = list(sys.path)
    loss = load_function(f"py:{tmp_path}/measure.py:loss")
    assert loss(2) == 14 and loss(2, scale=3) == 42
    assert sys.path == before
    with pytest.raises(CheckpointError, match="number is no function"):
        load_function(f"py:{tmp_path}/measure.py:number")
    with pytest.raises(CheckpointError, match="did you mean 'loss'"):
        load_function(f"py:{tmp_path}/measure.py:los")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("measure.py:loss", "named by py:"),
        ("py:measure", "no factory is named"),
        ("py:nowhere.py:loss", "no file nowhere.py"),
        ("py:no_such_package.inside:loss", "cannot be imported"),
    ],
)
def test_what_names_no_function(reference: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_function(reference)
