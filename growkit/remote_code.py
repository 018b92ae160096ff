"""The code files that let a user without growkit load a GDA folder. No torch.

The model's source files are copied next to the weights, flat, with their relative imports
rewritten; ``trust_remote_code=True`` loads them. They import nothing but torch, transformers,
huggingface_hub and each other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parent
SOURCES = (
    "modeling/configuration_gda.py",
    "modeling/modeling_gda.py",
    "modeling/poly_norm.py",
    "attention/gda.py",
    "attention/gda_heads.py",
    "families/lambda_schedule.py",
)
# vLLM needs AutoModel, from_pretrained the other two.
AUTO_MAP = {
    "AutoConfig": "configuration_gda.GdaConfig",
    "AutoModel": "modeling_gda.GdaModel",
    "AutoModelForCausalLM": "modeling_gda.GdaForCausalLM",
}

_RELATIVE_IMPORT = re.compile(r"^(\s*from )\.+(?:\w+\.)*(\w+)(?= import )", re.MULTILINE)
_GROWKIT_IMPORT = re.compile(r"^\s*(?:from|import)\s+growkit\b", re.MULTILINE)


def flattened(source: str) -> str:
    """Source text with every relative import made an import of a sibling file."""
    return _RELATIVE_IMPORT.sub(r"\1.\2", source)


def code_files() -> dict[str, str]:
    """File name -> text of every file of a self-contained folder."""
    files = {Path(path).name: flattened((ROOT / path).read_text("utf-8")) for path in SOURCES}
    for name, text in files.items():
        assert not _GROWKIT_IMPORT.search(text), f"{name} must not import growkit"
    return files


def export_code(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Write the code files into ``folder`` (made if missing); returns the ``auto_map``."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in code_files().items():
        (target / name).write_text(text, encoding="utf-8")
    return dict(AUTO_MAP)
