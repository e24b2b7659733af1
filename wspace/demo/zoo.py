"""Steps of the demonstration that use a zoo: build it, train a metanet on it, ask the metanet.

They run what `wspace zoo build`, `wspace fit` and `wspace test` run.
"""

import json
import logging
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wspace.io import load_checkpoint, save_checkpoint
from wspace.zoo import Zoo, build, recipe_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wspace.demo import Stage

RECIPE = {"dataset": "digits", "checkpoints": 1, "steps": (5, 300), "judged": 500}
METANETS = {
    "GraphMetanet": {"channels": 32, "layers": 3, "dropout": 0.1},
    "StatNN": {"hidden": [128, 128]},
}
NAMES = {"GraphMetanet": "graph metanet (GMN)", "StatNN": "statistics of each tensor (StatNN)"}


def build_zoo(stage: "Stage") -> None:
    """Trains many small classifiers of digits side by side, and keeps them in a zoo."""
    count, size = (24, 12) if stage.fast else (512, 64)
    recipe = recipe_from("image_classifiers", RECIPE | {"count": count, "size": size})
    start = time.perf_counter()
    zoo = build(recipe, zoo_folder(stage))
    seconds = time.perf_counter() - start
    accuracy = torch.tensor(zoo.table["test_accuracy"])
    low, high = float(accuracy.min()), float(accuracy.max())
    stage.found["zoo"] = zoo
    stage.say(f"{len(zoo)} classifiers, {low:.2f} to {high:.2f} accurate, in {seconds:.1f} s")
    stage.page.text(
        "Small convolutional networks learn the digits, each with its own learning rate, weight "
        "decay, share of the training images, share of wrong labels, initial scale and number of "
        "steps. They train side by side, one batched step moves them all. The folder is a zoo: "
        "weights in shards, what is known of each network in tables, and how it was all made. "
        "Building it again would continue where it was interrupted."
    ).code(zoo.card())
    stage.page.figure(_histogram(accuracy), "Test accuracies of the networks in the zoo.")


def train_metanets(stage: "Stage") -> None:
    """Trains networks on the weights of the zoo's networks, by Lightning."""
    stage.page.text(
        "Can one read from the weights alone how accurate a network is? Lightning trains two "
        "models on most of the zoo, with the binary cross-entropy to the accuracy and a loss on "
        "the order of pairs. Neither sees a digit. The graph metanet reads the parameter graph and "
        "gives the same answer for all equivalent weights; the baseline sees seven statistics of "
        "each tensor. The figures are of networks that were not trained on."
    )
    tested: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[tuple[object, ...]] = []
    for name, options in METANETS.items():
        start = time.perf_counter()
        figures, file, part = _fitted(stage, name, options)
        seconds = time.perf_counter() - start
        stage.found |= {f"task {name}": file, "tested": part}
        tested[NAMES[name]] = _asked(part, file)
        ends = [f"{figures[f'test/kendall_{end}']:.3f}" for end in ("low", "high")]
        tau, r2 = figures["test/kendall"], figures["test/r2"]
        rows.append((NAMES[name], f"{tau:.3f}", "–".join(ends), f"{r2:.3f}", f"{seconds:.1f} s"))
        stage.say(f"{NAMES[name]}: Kendall's τ {tau:.3f} ({'–'.join(ends)}), R² {r2:.3f}")
    stage.page.table(["model", "Kendall's τ", "95 % interval", "R²", "trained in"], rows)
    stage.page.figure(_scatter(tested), "Predicted against true accuracy of the test networks.")


def ask(stage: "Stage") -> None:
    """Predicts the accuracy of a checkpoint file."""
    from wspace.graph import encode
    from wspace.lit import load_task, predict

    zoo: Zoo = stage.found["tested"]
    row = int(torch.tensor(zoo.table["test_accuracy"]).argmax())
    space, state = zoo[row]
    file = stage.folder / "unknown.safetensors"
    save_checkpoint(state, file)
    task = load_task(stage.found["task GraphMetanet"])
    answer = float(predict(task, encode(space, load_checkpoint(file)))["test_accuracy"][0])
    truth = float(zoo.table["test_accuracy"][row])
    stage.say(f"{file.name}: predicted {answer:.2f}, true {truth:.2f}")
    stage.page.text(
        f"The best of the test networks as a checkpoint of its own, {file.name}: the trained "
        f"metanet says {answer:.2f}, and the network is right on {truth:.2f} of the test digits. "
        "From the shell this is"
    ).code(f"wspace predict --ckpt {stage.found['task GraphMetanet']} {file}")


def zoo_folder(stage: "Stage") -> Path:
    """Where the zoo goes: the small and the whole one are of different recipes."""
    return stage.folder / ("zoo_fast" if stage.fast else "zoo")


def _fitted(
    stage: "Stage", name: str, options: dict[str, Any]
) -> tuple[dict[str, float], Path, Zoo]:
    """Trains a metanet as `wspace fit` does.

    Returns:
        Test metrics of the checkpoint that is best on validation, its file, the test networks.
    """
    from wspace.lit.cli import TrainingCLI

    config = {
        "model": {
            "class_path": "Prediction",
            "init_args": {"metanet": name, "options": options, "rank_weight": 0.1},
        },
        "data": {
            "path": str(zoo_folder(stage)),
            "batch_size": 32,
            "fractions": [0.7, 0.1, 0.2],
        },
        "trainer": {
            "max_epochs": 2 if stage.fast else 60,
            "default_root_dir": str(stage.folder / "runs"),
            "enable_progress_bar": False,
        },
    }
    file = stage.folder / f"{name}.yaml"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    with _quiet():
        cli: Any = TrainingCLI(["fit", "--config", str(file)])
        best = cli.trainer.checkpoint_callback.best_model_path
        found = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)[0]
    return found, Path(best), cli.datamodule.parts["test"]


@contextmanager
def _quiet() -> Generator[None]:
    """Lightning without its notes on devices and its advice."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _asked(part: Zoo, file: Path) -> tuple[Tensor, Tensor]:
    """Predicted and true accuracies of the test networks."""
    from wspace.lit import load_task, predict_zoo

    found = predict_zoo(load_task(file), part)["test_accuracy"]
    return found, torch.tensor(part.table["test_accuracy"]).float()


def _histogram(values: Tensor) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 2.2), layout="constrained")
    ax = figure.add_subplot()
    ax.hist(values.numpy(), bins=40, color="#2f5fb3")
    ax.set(xlabel="test accuracy", ylabel="networks")
    return figure


def _scatter(tested: dict[str, tuple[Tensor, Tensor]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(tested), 3.6), layout="constrained")
    for i, (name, (found, true)) in enumerate(tested.items()):
        ax = figure.add_subplot(1, len(tested), i + 1)
        ax.plot([0, 1], [0, 1], color="#9aa3b4", linewidth=1)
        ax.scatter(true.numpy(), found.numpy(), s=14, color="#2f5fb3", alpha=0.7, linewidths=0)
        ax.set(title=name, xlabel="true accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.title.set_fontsize(9)
        if not i:
            ax.set_ylabel("predicted accuracy")
    return figure
