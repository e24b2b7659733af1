"""Every piece of code in README.md and in the docs runs, page by page, from the top down."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from wspace.cli import main
from wspace.io import save_checkpoint

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
INFOS = {"python", "text", "yaml", "shell", "bash", "json", ""}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NET = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    return net, (torch.randn(2, 1, 5, 5),)
"""
CONFIG = """{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 12, "n_layer": 1,
"n_head": 3, "n_positions": 16, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}"""


def blocks(page: Path, info: str) -> list[tuple[int, str]]:
    """Line and text of every block of a page with this info string."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start()) + 2, match[2])
        for match in BLOCK.finditer(text)
        if match[1] == info
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    before = _rules()
    try:
        for line, code in blocks(page, "python"):
            # line numbers of the page, so that a failure points at it
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    finally:
        _rules(before)
    capsys.readouterr()


def _rules(restore: dict[str, object] | None = None) -> dict[str, object]:
    """The rules of the tracer; a page may add one for itself."""
    from wspace.trace.rules import RULES

    if restore is not None:
        for name in RULES.keys() - restore.keys():
            del RULES[name]
    return dict(RULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_marked(page: Path) -> None:
    """No block escapes by an unknown info string, and no fence is left open."""
    text = page.read_text(encoding="utf-8")
    assert {match[1] for match in BLOCK.finditer(text)} <= INFOS
    assert text.count("\n```") % 2 == 0


def test_readme_has_what_is_run() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 4
    assert len(_commands()) >= 6


def _commands() -> list[str]:
    lines = "\n".join(text for _, text in blocks(ROOT / "README.md", "shell")).splitlines()
    return [line for line in lines if line.startswith("wspace ")]


def test_readme_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples_net.py").write_text(NET)
    Path("config.json").write_text(CONFIG)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    save_checkpoint(mlp.state_dict(), "model.safetensors")
    for line in _commands():
        code = main(shlex.split(line)[1:])
        shown = capsys.readouterr()
        assert code == 0, f"{line}\n{shown.out}{shown.err}"
    assert Path("net.svg").stat().st_size > 1000
    assert Path("again.safetensors").read_bytes() == Path("model.safetensors").read_bytes()


def test_commands_of_all_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `wspace …` in code names a command that is there."""
    main(["--help"])
    shown = capsys.readouterr().out
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for match in BLOCK.finditer(text) for line in match[2].splitlines()]
        lines += re.findall(r"`([^`\n]+)`", text)
        for name in (match[1] for line in lines if (match := re.match(r"wspace ([a-z]+)", line))):
            assert re.search(rf"^    {name}\b", shown, re.MULTILINE), f"{page.name}: wspace {name}"


def test_output_shown_in_the_readme_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    """The first `text` block after `print(space)` is what is printed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (code for _, code in blocks(ROOT / "README.md", "python") if "print(space)" in code)
    exec(code, {"__name__": "__docs__"})
    assert f"```text\n{capsys.readouterr().out}```" in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
