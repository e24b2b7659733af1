"""Runs every benchmark, each in a fresh process; ``--json FOLDER`` keeps their figures."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("trace_speed", "trace_scale", "act_speed", "which_models")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write one file per benchmark to this folder")
    parser.add_argument("names", nargs="*", choices=[*SCRIPTS, []], default=[], help="which to run")
    options = parser.parse_args()
    failed = []
    for name in options.names or SCRIPTS:
        command = [sys.executable, str(HERE / f"{name}.py")]
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(options.json / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
