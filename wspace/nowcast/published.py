"""The published NiNo predictors: their checkpoints, and their wiring with its peculiarities.

The published graphs differ from how networks compute (the bias of the keys leads to the residual
stream, heads are sources without inputs, layers follow in the order of the parameters), and the
published networks were trained on them. They are made here for what they are right enough for:
multilayer perceptrons, plain convolutional networks and GPT-2. The third convolution in the files
is never read by the output, so it is left out.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, NowcastError, message
from wspace.nowcast import topology as top
from wspace.nowcast.graph import NiNoGraph
from wspace.nowcast.mlp import NiNoMLP
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.topology import TAPS, Builder, Entry, Topology, lasting
from wspace.space import WeightSpace

CHECKPOINTS = {
    "34d9ff370327": "nino_mlp.pt",
    "389e4d51e79a": "nino_mlp_h32.pt",
    "2e2186e4a0e5": "nino_no_posw.pt",
}
"""First twelve digits of the SHA-256 of the published files."""

_ALIASES = (
    (r"layer_embed\.weight", "kind.weight"),
    (r"wte_pos_enc_layer\.weight", "token.weight"),
    (r"node_proj\.fc\.0\.", "place."),
    (r"edge_proj\.fc\.0\.", "enter."),
    (r"gnn\.convs\.(\d)\.edge_encoder\.", r"rounds.\1.film."),
    (r"gnn\.convs\.(\d)\.pre_nns\.0\.0\.", r"rounds.\1.pair."),
    (r"gnn\.convs\.(\d)\.post_nns\.0\.0\.", r"rounds.\1.mix."),
    (r"gnn\.convs\.(\d)\.lin\.", r"rounds.\1.lift."),
    (r"gnn\.edge_update\.(\d)\.lin_e\.", r"rounds.\1.own."),
    (r"gnn\.edge_update\.(\d)\.lin_s\.", r"rounds.\1.source."),
    (r"gnn\.edge_update\.(\d)\.lin_t\.", r"rounds.\1.target."),
    (r"gnn\.edge_update\.(\d)\.lin1\.", r"rounds.\1.out."),
    (r"edge_out\.fc\.0\.", "hidden."),
    (r"edge_out\.fc\.2\.", "head."),
    (r"edge_mlp\.fc\.(\d)\.", r"layers.\1."),
)


def load_published(path: str | Path, **options: Any) -> Predictor:
    """The predictor in a published checkpoint.

    Args:
        path: A ``.pt`` file of the published repository. It is read without running code from it.
        options: Further options: ``precision``, ``chunk``, ``still``, of a graph ``laplacian``;
            ``drift`` is on unless it is given.

    Returns:
        A `NiNoMLP` or `NiNoGraph` in evaluation mode. `origin` says which published file it is, by
        its SHA-256; empty for a file that is not one of them.

    Raises:
        CheckpointError: If the file is damaged, unsafe, or has other tensors than such predictors.
        NowcastError: If the predictor has no such option.
    """
    path = Path(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        state, form = held["state_dict"], dict(held["model_args"])
    except FileNotFoundError as error:
        help = "nothing is downloaded: fetch it from github.com/SamsungSAILMontreal/nino"
        text = message(f"load_published: no file {str(path)!r}", help=help)
        raise CheckpointError(text) from error
    except Exception as error:
        raise CheckpointError(_bad(path, [f"{type(error).__name__}: {error}"])) from error
    if not isinstance(state, Mapping) or "edge_proj.fc.0.weight" not in state:
        raise CheckpointError(_bad(path, ["no tensor 'edge_proj.fc.0.weight'"]))
    renamed = {_renamed(k): x for k, x in state.items() if not k.startswith("gnn.convs.2.")}
    predictor = _made(path, renamed, form, {"drift": True, **options})
    wanted = {k: tuple(x.shape) for k, x in predictor.state_dict().items()}
    found = {k: tuple(x.shape) for k, x in renamed.items() if isinstance(x, Tensor)}
    if wanted != found:
        differ = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        rows = [f"{k!r}: {found.get(k, 'missing')}, not {wanted.get(k, 'there')}" for k in differ]
        raise CheckpointError(_bad(path, rows))
    predictor.load_state_dict(renamed)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    predictor.origin = CHECKPOINTS.get(digest, "")
    return predictor.eval().requires_grad_(False)


def _renamed(key: str) -> str:
    for pattern, name in _ALIASES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def _made(
    path: Path, state: Mapping[str, Tensor], form: Mapping[str, Any], options: Mapping[str, Any]
) -> Predictor:
    """An empty predictor of the form that a checkpoint says it has."""
    plain = {"hid": 128, "ctx": 5, "seq_len": 40, "edge_types": 15}
    fixed = {
        "layers": 3, "max_feat_size": TAPS, "input_layer": "linear", "act_name": "silu",
        "residual": True, "dms": True, "scale_method": "std", "upd_scale": 1.0,
        "improved_graph": True, "final_edge_update": False, "towers": 1,
    }  # fmt: skip
    other = [f"{k}={form[k]!r}" for k, v in fixed.items() if form.get(k, v) != v]
    if other:
        raise CheckpointError(_bad(path, other))
    size = {k: int(form.get(k, v)) for k, v in plain.items()}
    same = {"context": size["ctx"], "longest": size["seq_len"], "kinds": size["edge_types"]}
    if form.get("gnn", True) in {False, None, "None", "none"}:
        return NiNoMLP(size["hid"], **same, **NiNoMLP.checked("load_published", options))
    tokens = state["token.weight"].shape[0] if "token.weight" in state else 0
    codes = int(form.get("lpe", 8))
    options = NiNoGraph.checked("load_published", options)
    return NiNoGraph(size["hid"], **same, codes=codes, tokens=tokens, **options)


def _bad(path: Path, got: list[str]) -> str:
    return message(
        f"load_published: {path.name} is not a published predictor that is supported",
        expected="the tensors of nino_mlp.pt, nino_mlp_h32.pt, nino_no_posw.pt or nino.pt",
        got=got,
        help="take the files of github.com/SamsungSAILMontreal/nino as they are",
    )


# ------------------------------------------------------------------------- wiring


@lasting
def published_topology(module: nn.Module | WeightSpace) -> Topology:
    """The graph that the published code makes of a module.

    Args:
        module: A multilayer perceptron, a plain convolutional network, or a GPT-2 of transformers.

    Returns:
        The topology; parameters have the names of ``named_parameters()``.

    Raises:
        NowcastError: If the module is something else.
    """
    if not isinstance(module, nn.Module):
        raise NowcastError(
            _refused("a weight space", ["the published wiring goes by the module's class"])
        )
    if is_gpt2(module):
        return _gpt2(module)
    return _chain(module)


def is_gpt2(module: nn.Module) -> bool:
    """True for the GPT-2s of transformers."""
    return getattr(getattr(module, "config", None), "model_type", None) == "gpt2"


def published_kind(name: str, shape: torch.Size, *, gpt2: bool) -> int:
    """Kind of the edges of a parameter, by its name and shape alone.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        gpt2: Whether it is one of a GPT-2. Its fused query, key and value count as queries here.

    Returns:
        The kind.
    """
    tables = {"wte.weight": top.TOKEN, "wpe.weight": top.POSITION, "c_attn.weight": top.QUERY}
    if gpt2:
        for ending, kind in tables.items():
            if name.endswith(ending):
                return kind
    if len(shape) == 1 and name.rsplit(".", maxsplit=1)[-1] == "weight":
        return top.NORM
    return {2: top.FC, 4: top.CONV}.get(len(shape), top.BIAS)


_LAYERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


def _chain(module: nn.Module) -> Topology:
    """Layers one after another, in the order of the parameters."""
    _check_chain(module)
    builder = Builder()
    units = builder.add(0)
    for _, layer in module.named_modules():
        own = [(n, p) for n, p in module.named_parameters() if _owner(module, n) is layer]
        for name, p in own:
            kind = published_kind(name, p.shape, gpt2=False)
            if p.dim() == 1:
                builder.dense(kind, units, builder.add(1), Entry(name, 1))
                continue
            outputs, inputs, taps = p.shape[0], p.shape[1], p[0, 0].numel()
            if len(units) == 0:
                units = builder.add(inputs)
            target = builder.add(outputs)
            entry = Entry(name, inputs * taps, taps, taps=taps)
            builder.dense(kind, target, units, entry)
            units = target
    return builder.build()


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _check_chain(module: nn.Module) -> None:
    wrong: list[str] = []
    width = 0
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        where = f"{name or type(module).__name__!r} ({type(layer).__name__})"
        if name and list(layer.children()) and not isinstance(layer, nn.Sequential):
            wrong.append(f"{where}, inside which the order of layers is not known")
        elif own and not isinstance(layer, (*_LAYERS, *_NORMS)):
            wrong.append(f"{where}, which is no plain layer")
        elif isinstance(layer, _LAYERS):
            outputs, inputs = layer.weight.shape[:2]
            if width not in {0, inputs} or getattr(layer, "groups", 1) != 1:
                wrong.append(f"{where} of {inputs} inputs after {width} outputs")
            if layer.weight[0, 0].numel() > TAPS:
                wrong.append(f"{where} with a kernel of more than {TAPS} entries")
            width = outputs
        elif own and len(own[0]) != width:
            wrong.append(f"{where} of {len(own[0])} channels after {width} outputs")
    names = len(list(module.named_parameters(remove_duplicate=False)))
    if names != len(list(module.named_parameters())):
        wrong.append("parameters that are shared")
    if wrong or not width:
        raise NowcastError(_refused(type(module).__name__, wrong or ["a module without layers"]))


def _refused(name: str, got: list[str]) -> str:
    return message(
        f"predict: {name} has no published topology",
        expected="linear and convolutional layers in a row, or a GPT-2 of transformers",
        got=got,
        help='use `topology="traced"`, which is correct for every module that can be traced',
    )


def _gpt2(module: nn.Module) -> Topology:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    first = next((n for n in shapes if n.endswith("wte.weight")), None)
    if first is None:
        raise NowcastError(_refused(type(module).__name__, ["no token embedding"]))
    root = first.removesuffix("wte.weight")
    depth = len({m[1] for n in shapes if (m := re.match(re.escape(root) + r"h\.(\d+)\.", n))})
    config: Any = module.config
    made = _GPT2(root, int(config.n_head), shapes)
    made.build(depth)
    held = {b.param for b in made.builder.blocks if b.param}
    if held != set(shapes):
        names = sorted(held ^ set(shapes))
        raise NowcastError(
            _refused(type(module).__name__, [f"{n!r}, which is no part of it" for n in names])
        )
    return made.builder.build()


class _GPT2:
    """The published graph of a GPT-2; a matrix is stored input by output."""

    def __init__(self, root: str, heads: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.root, self.heads, self.shapes = root, heads, shapes
        self.builder = Builder()

    def build(self, depth: int) -> None:
        """Adds everything but self-loops."""
        b, root = self.builder, self.root
        vocabulary, width = self.shapes[root + "wte.weight"]
        tokens = b.add(vocabulary)
        positions = b.add(self.shapes[root + "wpe.weight"][0])
        stream = b.add(width)
        b.tokens[0] = tokens
        b.dense(top.TOKEN, stream, tokens, Entry(root + "wte.weight", 1, width))
        b.dense(top.POSITION, stream, positions, Entry(root + "wpe.weight", 1, width))
        for i in range(depth):
            layer = f"{root}h.{i}."
            self._norm(layer + "ln_1", stream)
            stream = self._attention(layer + "attn.", stream)
            self._norm(layer + "ln_2", stream)
            hidden = self._linear(layer + "mlp.c_fc", stream)
            after = self._linear(layer + "mlp.c_proj", hidden)
            b.link(top.RESIDUAL, after, stream)
            stream = after
        self._norm(root + "ln_f", stream)

    def _norm(self, name: str, stream: Tensor) -> None:
        for ending, kind in ((".weight", top.NORM), (".bias", top.BIAS)):
            self.builder.dense(kind, stream, self.builder.add(1), Entry(name + ending, 1))

    def _linear(self, name: str, source: Tensor) -> Tensor:
        b = self.builder
        target = b.add(self.shapes[name + ".weight"][1])
        b.dense(top.FC, target, source, Entry(name + ".weight", 1, len(target)))
        b.dense(top.BIAS, target, b.add(1), Entry(name + ".bias", 1))
        return target

    def _attention(self, layer: str, stream: Tensor) -> Tensor:
        b, name, d = self.builder, layer + "c_attn.", len(stream)
        heads, query, value = b.add(self.heads), b.add(d), b.add(d)
        weight, bias = name + "weight", name + "bias"
        b.dense(top.QUERY, query, stream, Entry(weight, 1, 3 * d))
        b.dense(top.KEY, stream, query, Entry(weight, 3 * d, 1, d))
        b.dense(top.VALUE, value, stream, Entry(weight, 1, 3 * d, 2 * d))
        for i, target in enumerate((query, stream, value)):  # the keys' bias joins the stream
            b.dense(top.BIAS, target, b.add(1), Entry(bias, 1, 0, i * d))
        each = heads.repeat_interleave(d // self.heads)
        b.link(top.OTHER, query, each)
        b.link(top.OTHER, value, each)
        after = self._linear(layer + "c_proj", value)
        b.link(top.RESIDUAL, after, stream)
        return after
