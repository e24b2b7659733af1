"""Published graph metanetworks, made runnable for `metanet_speed` from checkouts of their own code.

Nothing of theirs is kept here: a folder holds the checkouts ``neural-graphs``, ``scalegmn`` and
``DWSNets``, their files and configurations are read there, and packages they import that are not
installed are stood in for. Two of the stand-ins are in a hot path and do what the originals do:
`Rearrange` (views) and `GaussianEncoding` (a product, a cosine and a sine). A process can load one
peer only, since their packages share names.
"""

import copy
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LAYOUT = [2, 32, 32, 1]

Weights = Sequence[Tensor]
"""``(B, in, out, 1)`` for each layer, or ``(B, out, 1)`` for the biases."""
Built = tuple[nn.Module, Callable[[], Tensor]]
"""A module, and a call that runs it on the prepared batch."""


# ---------------------------------------------------------------------- stand-ins


def provide(name: str, **attributes: Any) -> None:
    """Puts a module with these attributes in the place of a package that is not installed."""
    try:
        importlib.import_module(name)
    except ImportError:
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            path = ".".join(parts[:k])
            if path not in sys.modules:
                sys.modules[path] = ModuleType(path)
                sys.modules[path].__path__ = []
                if k > 1:
                    setattr(sys.modules[".".join(parts[: k - 1])], parts[k - 1], sys.modules[path])
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _NodeHeads(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.size(0), x.size(1), self.h, -1).transpose(1, 2)


class _EdgeHeads(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.size(0), x.size(1), x.size(2), self.h, -1).permute(0, 3, 1, 2, 4)


class _Merge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)


def _rearrange(pattern: str, h: int = 1) -> nn.Module:
    """The four patterns of the relational transformer, as modules that TorchScript takes."""
    made = {
        "b n m d -> b m n d": _Swap,
        "b n (h d) -> b h n d": lambda: _NodeHeads(h),
        "b n m (h d) -> b h n m d": lambda: _EdgeHeads(h),
        "... h n d -> ... n (h d)": _Merge,
    }
    return made[pattern]()


class _GaussianEncoding(nn.Module):
    """Random Fourier features: cosines and sines of a fixed Gaussian map."""

    def __init__(self, sigma: float, input_size: int, encoded_size: int) -> None:
        super().__init__()
        self.b = nn.Parameter(sigma * torch.randn(encoded_size, input_size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * math.pi * x @ self.b.T
        return torch.cat([y.cos(), y.sin()], -1)


def _instantiate(config: dict[str, Any], **more: Any) -> Any:
    module, name = config["_target_"].rsplit(".", 1)
    given = {k: v for k, v in config.items() if not re.fullmatch(r"_\w+_", k)}
    return getattr(importlib.import_module(module), name)(**given | more)


def stand_in() -> None:
    """Everything that any of the peers imports and an environment may lack."""
    importlib.import_module("torch_geometric.nn")  # looks for packages; before they stand in
    provide("einops", rearrange=None)
    provide("einops.layers.torch", Rearrange=_rearrange)
    provide("rff.layers", GaussianEncoding=_GaussianEncoding, PositionalEncoding=None)
    provide("hydra.utils", instantiate=_instantiate)
    provide("nfn.common", state_dict_to_tensors=None, WeightSpaceFeatures=None)
    provide("torchvision.utils", save_image=None)
    provide("functorch", make_functional=None)
    try:  # it has moved
        trim = importlib.import_module("torch_geometric.utils._trim_to_layer")
        sys.modules.setdefault("torch_geometric.utils.trim_to_layer", trim)
    except ImportError:
        pass


def _config(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """A Hydra file; ``${a.b}`` is looked up in `known`, the file itself being ``model``."""
    import yaml

    read: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))

    def resolved(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: resolved(v) for k, v in x.items()}
        if isinstance(x, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", x)):
            section, key = found[1].split(".")
            return (known | {"model": read}).get(section, {}).get(key)
        return x

    return resolved(read)


# -------------------------------------------------------------------------- peers


def neural_graph(folder: Path, weights: Weights, biases: Weights, name: str) -> Built:
    """NG-GNN (``pna``) or NG-T (``rtransformer``) as the scripts of the repository set them."""
    configs = folder / "experiments" / "inr_classification" / "configs"
    data = _config(configs / "data" / "mnist.yaml", {})
    config = _config(configs / "model" / f"{name}.yaml", {"data": data})
    if name == "pna":
        config["gnn_backbone"]["dropout"] = 0.2
        config["rev_edge_features"] = True
    else:
        config["dropout"] = 0.2
    model = _instantiate(config, layer_layout=LAYOUT)
    inputs = (tuple(weights), tuple(biases))
    return model, lambda: model(inputs)


def scalegmn(folder: Path, weights: Weights, biases: Weights, name: str) -> Built:
    """ScaleGMN by one of its files; graphs are made beforehand, as its data loader does."""
    import yaml

    package = sys.modules["src.data"] = ModuleType("src.data")  # without the data sets
    package.__path__ = [str(folder / "src" / "data")]
    path = folder / "configs" / "mnist_cls" / f"{name}.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["scalegmn_args"]
    config["layer_layout"] = LAYOUT
    tools = importlib.import_module("src.data.data_utils")
    convert = importlib.import_module("src.data.base_datasets").BaseDataset.batch_to_graphs
    hidden = torch.tensor([0 < i < len(LAYOUT) - 1 for i, n in enumerate(LAYOUT) for _ in range(n)])
    fixed = {
        "edge_index": tools.nn_to_edge_index(LAYOUT, "cpu"),
        "node2type": tools.get_node_types(LAYOUT) if config["node_pos_embed"] else None,
        "edge2type": tools.get_edge_types(LAYOUT) if config["edge_pos_embed"] else None,
        "direction": config["direction"],
        "hidden_nodes": hidden.unsqueeze(-1),
    }
    graphs = []
    for i in range(len(weights[0])):
        nodes, edges = convert(None, [w[i] for w in weights], [b[i] for b in biases])
        graphs.append(tools.to_pyg_batch(nodes, edges, **fixed)[0])
    batch = importlib.import_module("torch_geometric.data").Batch.from_data_list(graphs)
    model = importlib.import_module("src.scalegmn.models").ScaleGMN(config)
    return model, lambda: model(copy.copy(batch))


def dwsnet(_: Path, weights: Weights, biases: Weights, name: str) -> Built:
    """DWSNet with the defaults of its trainer for MNIST (`name` is not used)."""
    model = importlib.import_module("nn.models").DWSModelForClassification(
        weight_shapes=tuple(w.shape[1:3] for w in weights),
        bias_shapes=tuple(b.shape[1:2] for b in biases),
        input_features=1,
        hidden_dim=32,
        n_hidden=4,
        reduction="max",
        n_fc_layers=1,
        set_layer="sab",
        n_out_fc=1,
        dropout_rate=0.0,
        bn=True,
        diagonal=False,
    )
    inputs = (tuple(weights), tuple(biases))
    return model, lambda: model(inputs)


PEERS: dict[str, tuple[str, Callable[[Path, Weights, Weights, str], Built], str]] = {
    "ng_gnn": ("neural-graphs", neural_graph, "pna"),
    "ng_t": ("neural-graphs", neural_graph, "rtransformer"),
    "scale_gmn": ("scalegmn", scalegmn, "scalegmn"),
    "scale_gmn_bi": ("scalegmn", scalegmn, "scalegmn_bidir"),
    "dws": ("DWSNets", dwsnet, "defaults"),
}
"""Folder of the checkout, how it is made, and its configuration."""


def absent(key: str, peers: Path | None) -> str:
    """Why a peer cannot run; empty if it can."""
    folder, _, _ = PEERS[key]
    if peers is None:
        return f"{folder}: absent, give the folder of checkouts with --peers or WSPACE_PEERS"
    if not (peers / folder).is_dir():
        return f"{folder}: absent, no folder {peers / folder}"
    if importlib.util.find_spec("torch_geometric") is None:
        return f"{folder}: absent, torch_geometric is not installed"
    return ""


def build(key: str, peers: Path, weights: Weights, biases: Weights) -> Built:
    """The peer's module and a call that runs it on these weights."""
    folder, make, name = PEERS[key]
    stand_in()
    sys.path.insert(0, str(peers / folder))
    return make(peers / folder, weights, biases, name)
