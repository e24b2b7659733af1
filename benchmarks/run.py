"""Runs every benchmark, each in a fresh process.

``--json FOLDER`` keeps the figures; ``--page docs/benchmarks.md`` puts the tables into that page,
between the markers ``<!-- trace_speed -->`` and ``<!-- end -->``.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    *("trace_speed", "trace_scale", "act_speed", "which_models"),
    *("layer_speed", "metanet_speed", "zoo_speed", "training_speed"),
    *("align_speed", "prune_cases", "prune_speed"),
    *("hyper_heads", "hyper_lstm", "hyper_srwm"),
)


def run(name: str, more: list[str]) -> tuple[bool, str]:
    """Runs one script, shows what it prints while it does, and returns that."""
    command = [sys.executable, str(HERE / f"{name}.py"), *more]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    print(flush=True)
    return process.returncode == 0, "".join(lines)


def put(page: Path, name: str, output: str) -> None:
    """Replaces a marked block of the page by an output, without its title."""
    body = output.split("\n", 1)[1].strip().replace("\n## ", "\n### ")
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", "<!-- end -->"
    block = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    page.write_text(block.sub(lambda _: f"{start}\n{body}\n{end}", text, 1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one file per benchmark to this folder")
    parser.add_argument("--page", type=Path, help="put the tables into this page")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=SCRIPTS, help="which to run")
    options = parser.parse_args()
    failed = []
    for name in options.only:
        more = []
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            more = ["--json", str(options.json / f"{name}.json")]
        passed, output = run(name, more)
        if not passed:
            failed.append(name)
        elif options.page:
            put(options.page, name, output)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
