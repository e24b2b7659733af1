"""The demonstration: small networks trained, converted, moved, proved, pruned, nowcast, aligned.

A list of steps, each a function that does one thing for real, prints what it found and adds it to
the page. Nothing is downloaded: the digits are scikit-learn's, the other networks come from their
configurations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.demo.aligning import align_zoo
from wspace.demo.generating import generate
from wspace.demo.nowcasting import nowcast
from wspace.demo.pruning import prune_network
from wspace.demo.zoo import ask, build_zoo, train_metanets
from wspace.errors import MissingExtra, message
from wspace.graph import decode, encode, load_graph, save_graph
from wspace.io import load_checkpoint, save_checkpoint
from wspace.report import Report, plot_graph
from wspace.report.paint import heatmaps

if TYPE_CHECKING:
    from rich.console import Console

EPOCHS = 30
BATCH = 64
SEED = 0


@dataclass
class Stage:
    """What the steps hand on to each other.

    Attributes:
        folder: Where files go.
        out: Console that says what was found.
        page: The report.
        fast: Whether to do less.
        generator: Of all random numbers.
        found: Results by name, for later steps.
    """

    folder: Path
    out: "Console"
    page: Report
    fast: bool
    generator: torch.Generator
    found: dict[str, Any] = field(default_factory=dict[str, Any])

    def say(self, text: str) -> None:
        """Prints a finding."""
        self.out.print(f"  {text}", markup=False, soft_wrap=True)


def demo(out: str | Path, console: "Console", *, fast: bool = False) -> int:
    """Runs all steps and writes ``report.html``.

    Args:
        out: Folder for what is written; it is made if it is not there.
        console: Where to say what happens.
        fast: Train and prove less, for tests.

    Returns:
        0. What does not hold raises.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = Report(
        "The symmetry of networks, derived and proved",
        "Each number on this page was computed while it was written, by the command wspace demo.",
    )
    stage = Stage(folder, console, page, fast, torch.Generator().manual_seed(SEED))
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for number, (title, step) in enumerate(STEPS, 1):
            console.print(f"{number}. {title}", style="bold", markup=False)
            page.heading(title)
            step(stage)
    seconds = time.perf_counter() - start
    page.text(f"All of this took {seconds:.0f} s.")
    path = page.write(folder / "report.html")
    console.print(f"wrote {path} in {seconds:.0f} s", style="bold", markup=False, soft_wrap=True)
    return 0


# --- a network on digits --------------------------------------------------------------------------


def network() -> nn.Sequential:
    """A CNN for 8 × 8 images of digits: two convolutions, BatchNorm, pooling, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits.

    Returns:
        Images and labels to train on, images and labels to test on.

    Raises:
        MissingExtra: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtra(
            message("demo: needs scikit-learn", help="pip install 'wspace[demo]'")
        ) from error
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    images, labels = images[order], labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def _train(stage: Stage) -> None:
    images, labels, test, truth = digits()
    model, epochs = network(), 3 if stage.fast else EPOCHS
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=stage.generator).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    right = _accuracy(model, test, truth)
    stage.found |= {"model": model, "images": images, "labels": labels}
    stage.found |= {"test": test, "truth": truth}
    stage.say(f"{100 * right:.1f}% of {len(truth)} test digits right, after {seconds:.1f} s")
    stage.page.text(
        "A small convolutional network learns scikit-learn's handwritten digits: two convolutions "
        "with BatchNorm, a pooling, and a linear layer that reads the flattened image."
    ).facts(
        [
            ("training images", len(labels)),
            ("epochs", epochs),
            ("test accuracy", f"{100 * right:.1f}%"),
            ("seconds", f"{seconds:.1f}"),
        ]
    )


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def _space(stage: Stage) -> None:
    model, test = stage.found["model"], stage.found["test"]
    start = time.perf_counter()
    space = wspace.trace(model, test[:2])
    seconds = time.perf_counter() - start
    stage.found["space"] = space
    stage.say(space.summary())
    stage.page.text(
        "Traced once, without reading a weight. The space says which units index each axis of "
        "each tensor: permute a group everywhere it occurs, BatchNorm's statistics and the "
        "flattened image included, and the function stays the same. “!” marks what may not move."
    ).code(str(space))
    stage.page.facts(
        [
            ("groups", len(space.groups)),
            ("elements that some group moves", f"{100 * space.coverage:.1f}%"),
            ("seconds", f"{seconds:.2f}"),
        ]
    )


def _convert(stage: Stage) -> None:
    space, model = stage.found["space"], stage.found["model"]
    file, graph_file = (
        stage.folder / "digits.safetensors",
        stage.folder / "digits.graph.safetensors",
    )
    save_checkpoint(model.state_dict(), file)
    state = load_checkpoint(file)
    graph = encode(space, state)
    save_graph(graph, graph_file)
    back = decode(load_graph(graph_file))
    same = [torch.equal(back[name], state[name]) for name in state]
    if not all(same) or back.keys() != state.keys():
        raise AssertionError("the graph did not give the checkpoint back")
    stage.say(f"{graph!r}; {len(same)} tensors come back bit for bit")
    stage.page.text(
        f"The checkpoint ({file.name}) becomes a parameter graph and is read back from its file: "
        f"all {len(same)} tensors, buffers included, are equal bit for bit. Nodes are units, lines "
        "are weights: blue for positive, red for negative, strong for large; kernels are summed "
        "up in one line. The dots are filled with the bias."
    )
    stage.page.figure(plot_graph(graph), "The trained network as a parameter graph.")


def _move(stage: Stage) -> None:
    space, state = stage.found["space"], stage.found["model"].state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    name = next(p.name for p in space.params if len(p.axes) == 4 and not p.axes[1].fixed)
    permuted = wspace.act(wspace.sample(space, generator=stage.generator), state, space)
    kinds = ("permutation", "scale", "sign")
    element = wspace.sample(space, generator=stage.generator, kinds=kinds)
    versions = {
        "as trained": state,
        "permuted": permuted,
        "permuted, rescaled, signs flipped": wspace.act(element, state, space),
        f"control: {name} alone permuted": {**state, name: permuted[name]},
    }
    outputs = {title: _outputs(stage, weights) for title, weights in versions.items()}
    stage.page.text(
        "Every group is permuted at random, and units that allow it are rescaled or change their "
        "sign. Nearly every weight is another; no prediction is. The control permutes one tensor "
        "and leaves its partners: a permutation that is not in the group."
    ).table(
        ["weights", "accuracy", "same prediction", "largest change of an output"],
        [_compared(stage, title, outputs) for title in versions],
    )
    rows = [(title, _flat(weights[name])) for title, weights in list(versions.items())[:3]]
    stage.page.figure(
        heatmaps(rows, width=7.5), f"{name}, one row for each output channel: the same function."
    )
    stage.page.figure(
        heatmaps(_examples(stage, list(outputs.values())), columns=8, width=7.5),
        "Test digits, and what the network takes them for: as trained → moved → control.",
    )


def _outputs(stage: Stage, weights: dict[str, Tensor]) -> Tensor:
    """Outputs on the test digits with other weights, in which the network is not left."""
    with torch.no_grad():
        return torch.func.functional_call(stage.found["model"], weights, (stage.found["test"],))


def _compared(stage: Stage, title: str, outputs: dict[str, Tensor]) -> tuple[str, str, str, str]:
    first, here, truth = outputs["as trained"], outputs[title], stage.found["truth"]
    agree = f"{int((here.argmax(1) == first.argmax(1)).sum())} of {len(truth)}"
    right = f"{100 * float((here.argmax(1) == truth).float().mean()):.1f}%"
    stage.say(f"{title}: {right} right, {agree} predictions as before")
    return title, right, agree, f"{float((here - first).abs().max()):.1e}"


def _examples(stage: Stage, outputs: list[Tensor]) -> list[tuple[str, Any]]:
    guesses = torch.stack([outputs[i].argmax(1) for i in (0, 2, 3)], 1).tolist()
    images = stage.found["test"][:16, 0].double().numpy()
    return [
        (" → ".join(map(str, guess)), image) for guess, image in zip(guesses, images, strict=False)
    ]


def _flat(tensor: Tensor) -> Any:
    return tensor.flatten(1).double().numpy()


# --- other architectures --------------------------------------------------------------------------


def _configured() -> list[tuple[str, Callable[[], nn.Module], dict[str, Tensor]]]:
    """Networks built from transformers' configurations, with random weights."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra(
            message("demo: needs transformers", help="pip install 'wspace[demo]'")
        ) from error
    tf: Any = transformers
    tokens = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    ids = {"input_ids": torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(SEED))}
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    gpt2 = tf.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=32, **tokens)
    llama = tf.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        **tokens,
    )
    resnet = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[12, 20, 28], depths=[2, 2, 2], layer_type="basic",
        num_labels=7,
    )  # fmt: skip
    return [
        ("GPT-2", lambda: tf.GPT2LMHeadModel(gpt2), ids),
        ("Llama, grouped-query", lambda: tf.LlamaForCausalLM(llama), ids),
        ("ResNet", lambda: tf.ResNetForImageClassification(resnet), {"pixel_values": image}),
    ]


def _verify(stage: Stage) -> None:
    others = _configured()[: 1 if stage.fast else None]
    networks: list[tuple[str, nn.Module, tuple[Tensor, ...], dict[str, Tensor]]] = [
        ("CNN on digits", stage.found["model"], (stage.found["test"][:4],), {})
    ]
    networks += [(name, build().eval(), (), inputs) for name, build, inputs in others]
    rows: list[tuple[object, ...]] = []
    spaces: dict[str, wspace.WeightSpace] = {}
    for name, module, args, kwargs in networks:
        start = time.perf_counter()
        space = wspace.trace(module, args, kwargs)
        traced = time.perf_counter() - start
        report = wspace.verify(space, module, args, kwargs)
        proved = time.perf_counter() - start - traced
        spaces[name] = space
        elements = sum(p.numel for p in space.params if not p.buffer)
        rows.append(
            (
                *(name, f"{elements:,}", len(space.groups), f"{100 * space.coverage:.1f}%"),
                *(f"{report.max_error:.1e}", f"{report.control_error:.1e}"),
                *(f"{traced:.2f} s", f"{proved:.2f} s"),
            )
        )
        stage.say(f"{name}: {report}")
        if name == "GPT-2":
            stage.found["gpt2"] = encode(space, _state(module))
    stage.page.text(
        "No network is prepared by hand: the same trace derives each space from the program, and "
        "the proof runs on the weights in float64. All groups are moved at once and each alone; "
        "the error is the largest relative change of an output. A check has to be able to fail: "
        "the control is the smallest change that a permutation outside of the group makes."
    ).table(
        ["network", "parameters", "groups", "coverage", "error", "control", "traced", "proved"],
        rows,
    )
    for name, space in spaces.items():
        stage.page.code(str(space), summary=f"The space of {name}")


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}


def _transformer(stage: Stage) -> None:
    graph = stage.found["gpt2"]
    stage.say(f"GPT-2: {graph!r}")
    stage.page.text(
        "A box is a set of units, and boxes of one colour move together: the residual stream is "
        "one group through all layers. Within each attention head the units of queries and keys "
        "move together, and those of values by themselves, in every head in their own way."
    )
    stage.page.figure(plot_graph(graph), "A GPT-2 with two layers, weights as initialised.")


STEPS: tuple[tuple[str, Callable[[Stage], None]], ...] = (
    ("Train a network on digits", _train),
    ("Derive its symmetry", _space),
    ("Convert it to a graph, and back", _convert),
    ("Move it: other weights, same function", _move),
    ("Prove it, here and on other architectures", _verify),
    ("A transformer as a graph", _transformer),
    ("Prune it, and train what is left", prune_network),
    ("Nowcast a training run", nowcast),
    ("Generate a network for each task", generate),
    ("Build a zoo of classifiers", build_zoo),
    ("Align networks of the zoo", align_zoo),
    ("Train networks on weights", train_metanets),
    ("Ask about a checkpoint", ask),
)
