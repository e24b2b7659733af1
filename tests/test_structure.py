"""The shape of the code: who imports whom, how long things are, and what is never written.

Every check is a function of source text that returns its findings, so each is also run on a bad
snippet, where it must find something.
"""

import ast
import graphlib
import importlib
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from wspace import errors

ROOT = Path(__file__).parent.parent

# A file imports only from strictly lower ranks; files of one package import each other, but not
# in a circle. "wspace" is `wspace/__init__.py`: it imports anything, and only programs import it.
RANK = {
    "wiring": 0.5,
    "errors": 0,
    "restore": 0.5,
    "batchnorm": 1,
    "space": 1,
    "action": 2,
    "io": 2,
    "reference": 3,
    "trace": 3,
    "graph": 3,
    "nn": 4,
    "testing": 4,
    "augment": 5.5,  # aligned MixUp matches
    "align": 5,
    "prune": 5,
    "nowcast": 5,
    "hyper": 5,
    "zoo": 6,
    "lit": 7,
    "report": 7,
    "wspace": 8,
    "demo": 8.5,
    "cli": 9,
}
LINES_PER_FILE = 500
LINES_PER_FUNCTION = 50
PARAMETERS = 6

LEFT_OUT_OF_IMPORT = (
    "lightning",
    "pytorch_lightning",
    "torch_geometric",
    "networkx",
    "transformers",
    "matplotlib",
    "rich",
)
PROGRAMS = ("wspace.cli", "wspace.demo")  # these may print
VAGUE = {"utils", "util", "common", "base", "helpers", "misc"}
UNSAFE = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
}

# What only some modules may touch: dotted prefixes, and the modules that may (with what is below).
CAPTURE = (
    "torch.export",
    "torch.fx",
    "torch.overrides",
    "torch.utils._python_dispatch",
    "torch._subclasses",
    "torch._dynamo",
)
ONLY = [
    (
        CAPTURE,
        (
            "wspace.trace.capture",
            "wspace.trace.watching",
            "wspace.trace.sandbox",
            "wspace.trace.work",
        ),
    ),
    (("lightning", "pytorch_lightning"), ("wspace.lit", "datasets_zoo.experiments")),
]
TORCH_FREE = ("wspace.space", "wspace.trace.solve")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """One imported name: `import target`, or `from` its parent."""

    line: int
    target: str
    at_import: bool  # runs when the module is imported: not in a function, not under TYPE_CHECKING


def modules(package: str) -> dict[str, Path]:
    """Dotted name → file of every module in a package of this repository."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(_parts(file.relative_to(ROOT))): file for file in files}


def _parts(file: Path) -> tuple[str, ...]:
    parts = file.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


WSPACE = modules("wspace")
ALL = WSPACE | modules("datasets_zoo")


def each(table: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", sorted(table))


def source(name: str) -> str:
    return ALL[name].read_text(encoding="utf-8")


def nothing(findings: list[str]) -> None:
    """Fail with all findings, one per line."""
    assert not findings, "\n".join(["", *findings])


# --- imports ------------------------------------------------------------------


def imports(text: str, name: str, *, package: bool = False) -> list[Import]:
    """Every imported name of a module, absolute; `from a import b` gives `a.b`."""
    home = name.split(".") if package else name.split(".")[:-1]
    found: list[Import] = []
    for node, at_import in _walk(ast.parse(text), True):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = home[: len(home) - node.level + 1] if node.level else []
            stem = ".".join([*start, *filter(None, [node.module])])
            found += [
                Import(node.lineno, f"{stem}.{alias.name}", at_import) for alias in node.names
            ]
    return found


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, at_import
    if isinstance(node, Function):
        at_import = False
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _walk(child, False)
        for child in node.orelse:
            yield from _walk(child, at_import)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, at_import)


def resolve(target: str, known: Iterable[str]) -> str:
    """Module that an imported name belongs to: itself, or the nearest parent that is a module."""
    while target not in known and "." in target:
        target = target.rpartition(".")[0]
    return target


def part(name: str) -> str:
    """Key of a module in RANK: `trace` of `wspace.trace.solve`."""
    return name.split(".")[1] if "." in name else name


def upward(found: Iterable[Import], name: str, known: Iterable[str]) -> list[str]:
    """Imports of a wspace module that do not point to a strictly lower rank."""
    if name == "wspace":
        return []
    bad: list[str] = []
    for item in found:
        if item.target.split(".")[0] != "wspace":
            continue
        goal = resolve(item.target, known)
        if part(goal) != part(name) and RANK[part(goal)] >= RANK[part(name)]:
            bad.append(f"{name}:{item.line} imports {goal}, which is not of a lower rank")
    return bad


def cycle(table: Mapping[str, Iterable[Import]]) -> list[str]:
    """Modules that import each other in a circle while they are imported; empty if none do."""
    edges = {
        name: {resolve(item.target, table) for item in found if item.at_import} - {name}
        for name, found in table.items()
    }
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def imports_of(name: str) -> list[Import]:
    return imports(source(name), name, package=ALL[name].name == "__init__.py")


@each(WSPACE)
def test_imports_point_down(name: str) -> None:
    assert part(name) in RANK, f"{name}: give it a rank in tests/test_structure.py"
    nothing(upward(imports_of(name), name, WSPACE))


def test_imports_have_no_cycle() -> None:
    nothing(cycle({name: imports_of(name) for name in ALL}))


def test_library_does_not_import_recipes() -> None:
    users = [name for name in WSPACE for item in imports_of(name) if "datasets_zoo" in item.target]
    assert users == []


@pytest.mark.parametrize(
    "line",
    [
        "import wspace.cli",
        "from wspace.nn import linear",
        "from wspace import act",  # the package itself
        "from wspace import augment",  # another application
        "from . import prune",
        "def f():\n    from wspace.zoo import build",
    ],
)
def test_upward_finds(line: str) -> None:
    name = "wspace.testing" if "nn" in line else "wspace.align"
    known = {"wspace", "wspace.cli", "wspace.nn", "wspace.augment", "wspace.prune", "wspace.zoo"}
    assert upward(imports(line, name), name, known)


def test_upward_allows_siblings_and_lower_ranks() -> None:
    text = "from wspace import errors\nfrom . import solve\nfrom ..space import Axis"
    known = {"wspace", "wspace.errors", "wspace.space", "wspace.trace", "wspace.trace.solve"}
    assert upward(imports(text, "wspace.trace.rules"), "wspace.trace.rules", known) == []


def test_cycle_finds() -> None:
    table = {
        "wspace.nn.a": imports("from wspace.nn import b", "wspace.nn.a"),
        "wspace.nn.b": imports("from .a import f", "wspace.nn.b"),
    }
    assert set(cycle(table)) == {"wspace.nn.a", "wspace.nn.b"}


@pytest.mark.parametrize("late", ["def g():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_cycle_ignores_imports_that_run_later(late: str) -> None:
    table = {
        "wspace.nn.a": imports("from wspace.nn import b", "wspace.nn.a"),
        "wspace.nn.b": imports(late.format("from .a import f"), "wspace.nn.b"),
    }
    assert cycle(table) == []


# --- who may touch what -------------------------------------------------------


def names(text: str, name: str, *, package: bool = False) -> dict[str, int]:
    """Every dotted name in a module, aliases resolved (`from torch import fx`), and its line."""
    tree = ast.parse(text)
    alias = _aliases(tree)
    found = {item.target: item.line for item in imports(text, name, package=package)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and (dotted := _dotted(node, alias)):
            found.setdefault(dotted, node.lineno)
    return found


def _aliases(tree: ast.AST) -> dict[str, str]:
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            alias |= {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            alias |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return alias


def _dotted(node: ast.AST, alias: Mapping[str, str]) -> str:
    """`torch.fx.Graph` of the expression `fx.Graph`; empty if it is not a plain dotted name."""
    tail: list[str] = []
    while isinstance(node, ast.Attribute):
        tail.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([alias.get(node.id, node.id), *reversed(tail)])


def below(name: str, tops: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def trespasses(found: Mapping[str, int], name: str) -> list[str]:
    """Names that this module may not touch."""
    bad = [
        f"{name}:{line} touches {target}, which only {owners} may"
        for prefixes, owners in ONLY
        for target, line in found.items()
        if below(target, prefixes) and not below(name, owners)
    ]
    if name in TORCH_FREE:
        bad += [
            f"{name}:{line} touches {target}; it is free of torch"
            for target, line in found.items()
            if below(target, ["torch"])
        ]
    return bad


@each(WSPACE)
def test_modules_keep_to_their_business(name: str) -> None:
    package = WSPACE[name].name == "__init__.py"
    nothing(trespasses(names(source(name), name, package=package), name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wspace.trace", "import torch\ntorch.export.export(m, a)"),
        ("wspace.prune.slice", "from torch import fx"),
        ("wspace.nn.dws", "import torch.fx as f"),
        ("wspace.trace.verify", "from torch.overrides import TorchFunctionMode"),
        ("wspace.nowcast", "def f():\n    import lightning as L"),
        ("wspace.zoo", "from pytorch_lightning import Trainer"),
        ("wspace.space", "from torch import Tensor"),
        ("wspace.trace.solve", "import torch.nn"),
    ],
)
def test_trespasses_finds(name: str, text: str) -> None:
    assert trespasses(names(text, name), name)


def test_trespasses_allows_the_owners() -> None:
    assert trespasses(names("import torch.fx", "m"), "wspace.trace.capture") == []
    assert trespasses(names("import lightning", "m"), "wspace.lit.callbacks") == []


# --- sizes --------------------------------------------------------------------


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not only a comment, not a docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def oversized(text: str, name: str) -> list[str]:
    """File, functions and parameter lists over the limits.

    Keyword-only options do not count, nor do parameters of a tracing rule: they are the operator's.
    """
    bad: list[str] = []
    if (size := len(text.splitlines())) > LINES_PER_FILE:
        bad.append(f"{name} has {size} lines, of at most {LINES_PER_FILE}")
    code = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, Function):
            continue
        size = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        if size > LINES_PER_FUNCTION:
            bad.append(f"{name}:{node.lineno} {node.name} has {size} lines of code")
        takes = [*node.args.posonlyargs, *node.args.args]
        count = len(takes) - bool(takes and takes[0].arg in {"self", "cls"})
        if count > PARAMETERS and not _is_rule(node, name):
            bad.append(f"{name}:{node.lineno} {node.name} takes {count} parameters")
    return bad


def _is_rule(node: Function, name: str) -> bool:
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return below(name, ["wspace.trace"]) and any(mark.startswith("rule(") for mark in marks)


@each(ALL)
def test_sizes(name: str) -> None:
    nothing(oversized(source(name), name))


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * (LINES_PER_FILE + 1),
        "def f():\n" + "    x = 1\n" * LINES_PER_FUNCTION,
        "class A:\n    async def f(self):\n" + "        x = 1\n" * LINES_PER_FUNCTION,
        "def f(a, b, c, d, /, e, g, h): pass",
    ],
)
def test_oversized_finds(text: str) -> None:
    assert len(oversized(text, "m")) == 1


def test_oversized_excuses_only_rules() -> None:
    text = '@rule("lerp")\ndef _lerp(a, b, c, d, e, f, g): ...'
    assert oversized(text, "wspace.trace.rules") == []
    assert len(oversized(text, "wspace.align")) == 1
    assert len(oversized(text.replace("rule", "cache"), "wspace.trace.rules")) == 1


def test_oversized_allows_prose_and_options() -> None:
    prose = '    """Sum.\n' + "\n    prose\n" * 60 + '    """\n' + "    # why\n\n" * 60
    code = "    x = 1\n" * (LINES_PER_FUNCTION - 1)
    assert oversized("def f(self, a, b, c, d, e, g, *rest, h=1, i=2):\n" + prose + code, "m") == []


# --- what is never written ----------------------------------------------------


def forbidden(text: str, name: str) -> list[str]:
    """Unsafe loading, bare `except`, printing outside of programs, vague module names."""
    bad = [f"{name}: {word!r} says nothing" for word in VAGUE.intersection(name.split("."))]
    tree = ast.parse(text)
    alias = _aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            bad.append(f"{name}:{node.lineno} bare except")
        if isinstance(node, ast.Call):
            call = _dotted(node.func, alias)
            options = {item.arg: ast.unparse(item.value) for item in node.keywords}
            if _unsafe(call, options) or (call == "print" and not below(name, PROGRAMS)):
                bad.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return bad


def _unsafe(call: str, options: Mapping[str | None, str]) -> bool:
    if call in {"torch.load", "torch.serialization.load"}:
        return options.get("weights_only") != "True"
    if call in {"np.load", "numpy.load"}:
        return options.get("allow_pickle", "False") != "False"
    return call in UNSAFE


@each(ALL)
def test_nothing_forbidden(name: str) -> None:
    nothing(forbidden(source(name), name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wspace.io", "import torch\ntorch.load(path)"),
        ("wspace.io", "import torch as t\nt.load(path, weights_only=False)"),
        ("wspace.io", "from torch import load as read\nread(path)"),
        ("wspace.io", "import pickle\npickle.loads(data)"),
        ("wspace.io", "from pickle import Unpickler\nUnpickler(file).load()"),
        ("wspace.io", "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)"),
        ("wspace.io", "import numpy as np\nnp.load(path, allow_pickle=True)"),
        ("wspace.io", "try:\n    f()\nexcept:\n    pass"),
        ("wspace.prune", "print('done')"),
        ("wspace.clip", "print('done')"),
        ("wspace.graph.utils", ""),
    ],
)
def test_forbidden_finds(name: str, text: str) -> None:
    assert len(forbidden(text, name)) == 1


def test_forbidden_allows_the_safe_forms() -> None:
    text = (
        "import torch, yaml\ntorch.load(path, weights_only=True)\nyaml.safe_load(x)\nprint('done')"
    )
    assert forbidden(text, "wspace.cli") == []


# --- modules as imported ------------------------------------------------------


def left_out(text: str, exported: Iterable[str], *, package: bool = False) -> list[str]:
    """Public functions and classes (in a package also what it imports by name) not in `__all__`."""
    public: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, Function | ast.ClassDef):
            public.add(node.name)
        elif package and isinstance(node, ast.ImportFrom) and node.module != "__future__":
            ours = node.level or (node.module or "").split(".")[0] in {"wspace", "datasets_zoo"}
            public |= {item.asname or item.name for item in node.names} if ours else set()
    return sorted(name for name in public - set(exported) if not name.startswith("_"))


@each(ALL)
def test_module_imports_and_exports_what_it_says(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert [item for item in exported if not hasattr(module, item)] == []
    assert len(set(exported)) == len(exported)
    if exported:
        package = ALL[name].name == "__init__.py"
        assert left_out(source(name), exported, package=package) == []


def test_left_out_finds() -> None:
    text = "from wspace.action import act, sample as draw\nimport os\nclass A: ...\ndef _f(): ..."
    assert left_out(text, ["A"], package=True) == ["act", "draw"]
    assert left_out(text, []) == ["A"]


def loaded(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after a statement."""
    script = f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_stays_light() -> None:
    assert loaded("import wspace") & set(LEFT_OUT_OF_IMPORT) == set()


def test_loaded_finds() -> None:
    assert loaded("import networkx") & set(LEFT_OUT_OF_IMPORT) == {"networkx"}


def test_tree_is_there() -> None:
    """The checks above saw the modules that everything else stands on."""
    assert {"wspace", "wspace.errors", "wspace.space", "datasets_zoo"} <= set(ALL)


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    sections = {line.removeprefix("## ") for line in page if line.startswith("## ")}
    assert sections == {name for name, item in vars(errors).items() if _is_error(item)}


def _is_error(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, errors.WSpaceError)
