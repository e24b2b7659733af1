"""Text in streams, and recurrent models that learn it."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from torch import Tensor

from datasets_zoo.experiments.text import Streams, TextData
from datasets_zoo.text import Tokenizer, text
from wspace.cli import main
from wspace.errors import HyperError, ZooError
from wspace.lit.hyper.language import CELLS, CharacterModel, lstm
from wspace.lit.hyper.loading import load_hyper
from wspace.lit.task import Optimization
from wspace.testing import assert_close, assert_same

SMALL: dict[str, Any] = {"hidden_size": 9, "hyper_size": 5, "embedding_size": 2}
CONFIGS = Path(__file__).parent.parent / "configs" / "hyper"
ZEN = len(Tokenizer.of(text("zen")))


def data_of(**options: Any) -> TextData:
    data = TextData("zen", **{"batch_size": 3, "length": 8} | options)
    data.setup("fit")
    return data


def trainer_of(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    plain: dict[str, Any] = {"accelerator": "cpu", "enable_model_summary": False, **quiet}
    return Trainer(**plain, num_sanity_val_steps=0, gradient_clip_val=1.0, **options)


# --------------------------------------------------------------------------- the data


def test_batches_go_on_where_the_one_before_ended() -> None:
    tokens = torch.arange(3 * 20 + 1)
    streams = Streams(tokens, 3, 8)
    assert len(streams) == 3 and streams[2][0].shape == (3, 4)
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))
    assert_same(inputs, tokens[:60].view(3, 20))
    assert_same(targets, inputs + 1)


def test_streams_use_all_but_few_tokens() -> None:
    for count in range(4, 12):
        streams = Streams(torch.arange(count), 3, 2)
        assert streams.inputs.numel() == (count - 1) // 3 * 3
        assert sum(x.numel() for x, _ in streams) == streams.inputs.numel()


def test_parts_are_the_text_in_order() -> None:
    data = data_of(fractions=(0.5, 0.25, 0.25), batch_size=1)
    whole = text("zen")
    at = 0
    for part in ("train", "val", "test"):
        read = data.tokenizer.decode(data.parts[part].inputs[0])
        assert whole[at:].startswith(read) and len(read) > 200
        at += len(read) + 1  # the last character is a target only
    assert at == len(whole) and data.vocabulary == ZEN


def test_loaders_keep_the_order() -> None:
    data = data_of()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    for loader, streams in zip(loaders, data.parts.values(), strict=True):
        assert_same([x for x, _ in loader], [x for x, _ in streams])


def test_bytes_are_256_whatever_the_text() -> None:
    data = data_of(tokens="bytes")
    assert data.vocabulary == 256
    assert data.tokenizer.decode(data.parts["train"].inputs[0, :14]) == "The Zen of Pyt"


def test_what_data_refuses() -> None:
    with pytest.raises(ZooError, match="one of characters, bytes"):
        TextData("zen", tokens="words")
    with pytest.raises(ZooError, match="three positive numbers"):
        TextData("zen", fractions=(0.9, 0.1))
    with pytest.raises(ZooError, match=r"(?s)at least one step.*smaller batch_size"):
        data_of(batch_size=60)
    with pytest.raises(ZooError, match="positive"):
        data_of(length=0)
    with pytest.raises(IndexError):
        data_of().parts["train"][999]


# -------------------------------------------------------------------------- the model


def bpc_by_hand(model: CharacterModel, streams: Streams, *, carry: bool) -> float:
    state, total, count = None, 0.0, 0
    with torch.no_grad():
        for x, y in streams:
            logits, state = model(x, state if carry else None)
            total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
            count += y.numel()
    return total / count / log(2)


@pytest.mark.parametrize("cell", CELLS)
def test_fit_learns_and_tests(cell: str) -> None:
    torch.manual_seed(0)
    data = data_of()
    model = CharacterModel(ZEN, cell, optimization=Optimization(lr=2e-2), **SMALL)
    before = bpc_by_hand(model, data.parts["train"], carry=True)
    trainer = trainer_of(max_epochs=6)
    trainer.fit(model, datamodule=data)
    assert 0 < trainer.callback_metrics["val/bpc"] < 5
    assert bpc_by_hand(model, data.parts["train"], carry=True) < before - 1
    tested = trainer.test(model, datamodule=data, verbose=False)[0]
    by_hand = bpc_by_hand(model.eval(), data.parts["test"], carry=True)
    assert abs(tested["test/bpc"] - by_hand) < 1e-4


@pytest.mark.parametrize("cell", ["lstm", "hyper_lstm_ln"])
def test_state_is_carried_or_not(cell: str) -> None:
    data = data_of()
    found: list[float] = []
    for carry in (True, False):
        torch.manual_seed(0)
        model = CharacterModel(ZEN, cell, carry=carry, **SMALL)
        trainer = trainer_of()
        (value,) = trainer.validate(model, datamodule=data, verbose=False)
        trainer.validate(model, datamodule=data, verbose=False)  # begins with zeros again
        assert abs(value["val/bpc"] - trainer.callback_metrics["val/bpc"]) < 1e-6
        assert abs(value["val/bpc"] - bpc_by_hand(model, data.parts["val"], carry=carry)) < 1e-4
        found.append(value["val/bpc"])
    assert abs(found[0] - found[1]) > 1e-5


def test_gradients_end_with_the_batch() -> None:
    model = CharacterModel(ZEN, **SMALL)
    trainer_of(max_epochs=1).fit(model, datamodule=data_of())
    state = model._states["train"]
    assert all(not part.requires_grad for part in state) and state.h.abs().max() > 0


def test_lstm_begins_like_the_others() -> None:
    """So that what is compared is the cells, not their starts."""
    net = lstm(7, 5, 2)
    for name, p in net.named_parameters():
        if "weight_hh" in name:
            for w in p.chunk(4):
                torch.testing.assert_close(w @ w.T, torch.eye(5), atol=1e-5, rtol=0)
    for layer in range(2):
        total = net.get_parameter(f"bias_ih_l{layer}") + net.get_parameter(f"bias_hh_l{layer}")
        assert total.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10
    with torch.no_grad():
        out = net(torch.zeros(1, 3, 7))[0]
    assert isinstance(out, Tensor) and out.shape == (1, 3, 5)


def test_layers_and_sampling() -> None:
    model = CharacterModel(ZEN, num_layers=2, **SMALL)
    start = torch.tensor([3, 1, 2])
    first, again = (
        model.sample(start, 5, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert_same(first, again)
    assert_same(first[:3], start)
    assert first.shape == (8,) and int(first.max()) < ZEN
    cold = model.sample(start, 1, temperature=1e-6)
    assert int(cold[-1]) == int(model(start[None])[0][0, -1].argmax())


def test_weights_come_back_from_a_state_dict() -> None:
    a, b = (CharacterModel(ZEN, "hyper_lstm_ln", **SMALL) for _ in range(2))
    x = torch.randint(ZEN, (2, 5))
    b.load_state_dict(a.state_dict())
    assert_close(a(x)[0], b(x)[0])


def test_what_the_model_refuses() -> None:
    with pytest.raises(HyperError, match="one of lstm, layer_norm_lstm"):
        CharacterModel(cell="gru")
    with pytest.raises(HyperError, match="options of lstm"):
        CharacterModel(cell="lstm", recurrent_dropout=0.1)
    with pytest.raises(HyperError, match="options of layer_norm_lstm"):
        CharacterModel(cell="layer_norm_lstm", noise=0.1)
    with pytest.raises(HyperError, match=rf"(?s)not that of the text.*--model.vocabulary {ZEN}"):
        trainer_of(max_steps=1).fit(CharacterModel(ZEN + 1, **SMALL), datamodule=data_of())


def test_configurations_are_what_the_classes_take() -> None:
    for name, count in (("lstm_text", 152_065), ("lstm_docs", 300_544)):
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        options = content["model"]["init_args"]
        how = Optimization(**options.pop("optimization"))
        model = CharacterModel(**options, optimization=how)
        assert sum(p.numel() for p in model.parameters()) == count
        data = TextData(**content["data"]["init_args"])
        assert (data.batch_size, data.length) == (32, 64)


def test_wspace_fit_runs_and_its_file_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", str(CONFIGS / "lstm_docs.yaml"), "--data.name", "zen"]
    words += ["--data.batch_size", "2", "--data.length", "8", "--trainer.max_epochs", "1"]
    words += ["--model.hidden_size", "8", "--model.hyper_size", "4", "--trainer.accelerator", "cpu"]
    words += ["--trainer.log_every_n_steps", "1"]
    assert main([*words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert "val/bpc" in capsys.readouterr().out
    file = tmp_path / "lstm_docs" / "version_0" / "checkpoints" / "last.safetensors"
    task = load_hyper(file)
    assert isinstance(task, CharacterModel) and task.cell == "hyper_lstm_ln"
    assert task.optimization == Optimization(lr=1e-2, weight_decay=0.0)
    logits = task(torch.randint(256, (2, 3)))[0]
    assert logits.shape == (2, 3, 256) and bool(logits.isfinite().all())
