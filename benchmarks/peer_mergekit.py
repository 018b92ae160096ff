"""mergekit (PyPI) as the peer for depth growth, in a virtual environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def install_mergekit(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """(its command or None, versions or the error). An existing environment is used again."""
    command, python = folder / "bin" / "mergekit-yaml", folder / "bin" / "python"
    if not command.exists():
        venv.create(folder, with_pip=True)
        # The project's own torch: mergekit's imports are not slower than they need to be.
        pip = [python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, "mergekit"]
        result = subprocess.run([str(part) for part in pip], capture_output=True, text=True)
        if result.returncode:
            return None, {"error": (result.stderr.strip() or "pip failed").splitlines()[-1]}
    code = (
        "from importlib.metadata import version\n"
        "for name in ('mergekit', 'torch', 'transformers', 'safetensors'):\n"
        "    print(name, version(name))"
    )
    listed = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    versions = dict(line.split() for line in listed.stdout.splitlines())
    return command, versions


def passthrough_recipe(source: Path, layers: int, added: int) -> str:
    """A passthrough merge: after every run of layers, its last one again with zero outputs.

    The result is growkit's ``--layers +ADDED --layer-placement even``.
    """
    run = layers // added
    lines = ["merge_method: passthrough", "dtype: bfloat16", "slices:"]
    for start in range(0, layers, run):
        end = start + run
        lines += [
            f"- sources: [{{model: {source}, layer_range: [{start}, {end}]}}]",
            "- sources:",
            f"  - model: {source}",
            f"    layer_range: [{end - 1}, {end}]",
            "    parameters:",
            "      scale:",
            "      - {filter: o_proj, value: 0.0}",
            "      - {filter: down_proj, value: 0.0}",
            "      - {value: 1.0}",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(install_mergekit(Path(sys.argv[1])))
