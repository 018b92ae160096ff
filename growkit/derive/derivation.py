"""A table derived as a whole: studied, put into words, proven, kept.

growkit derive CKPT            the user's own config, into the cache folder
python -m growkit.derive.all   every class of transformers, into the package
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from growkit.core.errors import CheckpointError
from growkit.core.names import CONFIG
from growkit.core.writing import write_whole
from growkit.derive.builder import Builder, Underivable, said_by
from growkit.derive.few_layers import MOST_LAYERS
from growkit.derive.proof import prove
from growkit.derive.studied import TIES, Findings, Step, explicit, rounded_twin, study, tied_twin
from growkit.derive.table import make_table
from growkit.families.derived.family import read_with
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import cache_folder, file_stem
from growkit.families.layer_fields import Path as ConfigPath
from growkit.families.layer_fields import leaf
from growkit.verification.loading import AUTO_CLASSES, NamedClass, quiet_transformers


def derive(config: Any, step: Step = lambda text: None, auto: Any = None) -> dict[str, Any]:
    """The table of a config's class, every operator proven on a twin or refused with a reason.

    Args:
        config: a config object of transformers.
        step: told what is being done.
        auto: the Auto class that loads it; by default the first that knows it.

    Raises:
        Underivable: with what was tried.
    """
    with quiet_transformers(), _offline():
        builder = Builder(config, auto)
        values = explicit(builder, config)
        table = _studied(builder, config, values, step)
        tied = leaf(values, (*table["place"], TIES))
        if tied is True and table["flags"].get(TIES) is False:  # more than the projection is tied
            step("with tied embeddings")
            table = _studied(builder, config, values, step, keep_ties=True)
    return table


def _studied(
    builder: Builder, config: Any, values: Any, step: Step, *, keep_ties: bool = False
) -> dict[str, Any]:
    found = study(builder, values, step, keep_ties=keep_ties)
    if other := _of_another_kind(values, found):
        step("twin of the same kind")  # a smaller number made it smaller, and it another model
        found = study(builder, values, step, keep_ties=keep_ties, keep=other)
    table = make_table(builder, config, found)
    _fit_model(table, builder, values, found)
    prove(table, builder, found, step)
    _settle_ties(table, builder, found, step)
    _settle_widths(table, builder, found, step)
    return table


def _of_another_kind(values: Any, found: Findings) -> list[ConfigPath]:
    """Fields of which a table holds for one value alone, and the twin has another."""
    counted = {*found.closings.counts, *(found.second.counts if found.second else ())}
    return [
        path
        for path in found.axes.structural
        if path[-1] not in counted and leaf(found.values, path) != leaf(values, path)
    ]


class _Stored(NamedTuple):
    """A tensor as the header of a file tells of it."""

    shape: tuple[int, ...]


def _fit_model(table: dict[str, Any], builder: Builder, values: Any, found: Findings) -> None:
    """Compare the table's sizes with those of the model itself, not of its twin: what the twin
    could not tell from a constant is as large as it is stored.

    Raises:
        Underivable: a size that grows does not follow.
    """
    count = leaf(values, found.layers.counter) or found.layers.count
    place = replace(found.layers, count=count, second=None)
    config = values if found.layers.second else place.moved(values, range(min(count, MOST_LAYERS)))
    try:
        full = builder.shapes(config)
        names = {name: _Stored(shape) for name, shape in full.items()}
        told = names if "rounded" in table else ()
        family = read_with(table, {**config, "model_type": table["model_type"]}, told)
        declared = dict(family.declared(family.sizes_of(config)))
    except Exception:  # a class that is not built without its numbers, or a config left open
        return
    of_twin = {name: tuple(value.shape) for name, value in found.model.model.state_dict().items()}
    alike = {
        found.axes.names.role_name(name)[1]
        for name, shape in found.model.shapes.items()
        if of_twin.get(name) == shape
    }
    entries = {entry["name"]: entry for entry in table["tensors"]}
    for name, shape in declared.items():
        template = found.axes.names.role_name(name)[1]
        wanted = full.get(name)
        if template not in alike or template not in entries or wanted in (None, shape):
            continue
        for dim, (mine, real) in enumerate(zip(shape, wanted, strict=False)):
            said = entries[template]["dims"][dim]
            segments = said[1]
            if mine == real:
                continue
            if any(axis != "fixed" for _, items in segments for axis, _ in items):
                raise Underivable(
                    f"The size of {template} in the model does not follow from its twin's: "
                    f"{real}, not {mine}."
                )
            entries[template]["dims"][dim] = [0, [["", [["fixed", [["stored", template, dim]]]]]]]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No class may look for kernels, code or defaults on a server meanwhile."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _settle_ties(table: dict[str, Any], builder: Builder, found: Findings, step: Step) -> None:
    """Whether the table holds with tied embeddings too: the same proof, on a tied twin."""
    if found.untied is None:
        return
    whole = len(found.untied) == 1 and bool(found.layers.place)  # of the wrapper, not its text part
    kind, name = ("^flag", f"^{TIES}") if whole else ("flag", TIES)
    step("proof with tied embeddings")
    try:
        tied = tied_twin(builder, found)
        flags = {flag: value for flag, value in table["flags"].items() if flag != name}
        trial = {**table, "tied": kind, "operators": {}, "flags": flags}
        proven = [option for option, proof in table["operators"].items() if "error" in proof]
        first = "--layers" if "--layers" in proven else proven[0]
        only = [first, "--untie-embeddings", "--vocab"]
        only += ["--hidden"] if "error" in table["operators"]["--hidden"] else []
        trial["stream"] = json.loads(json.dumps(table["stream"]))
        prove(trial, builder, tied, step, only=only)
        proofs = trial["operators"]
        holds = "error" in proofs[first]
    except Exception:  # a refusal of the class
        holds = False
    if not holds:
        if whole:
            table["flags"][name] = False
        return
    table["tied"] = kind
    table["flags"].pop(name, None)
    table["operators"]["--untie-embeddings"] = proofs["--untie-embeddings"]
    if why := proofs.get("--hidden", {}).get("why"):
        table["stream"]["tied"] = f"with tied embeddings it could not be proven: {why}"
    elif "why" in trial["stream"].get("norm", {}):
        table["stream"]["norm"] = trial["stream"]["norm"]


def _settle_widths(table: dict[str, Any], builder: Builder, found: Findings, step: Step) -> None:
    """Whether the table holds too where the class rounds the widths of the config: every growth is
    proven once more, of a config whose widths are those of the files alone."""
    rounded = table.get("rounded")
    if not rounded:
        return
    step("proof with rounded widths")
    flags = {flag: value for flag, value in table["flags"].items() if flag != rounded["flag"]}
    trial = {**table, "operators": {}, "flags": flags}
    proven = [option for option, proof in table["operators"].items() if "error" in proof]
    proven = [option for option in proven if option != "--untie-embeddings"]  # of a tied twin
    try:
        prove(trial, builder, rounded_twin(builder, found), step, only=proven)
        lost = {o: p["why"] for o, p in trial["operators"].items() if "why" in p}
    except Exception as error:  # whatever the class objects to
        lost = dict.fromkeys(proven, said_by(error))
    if not lost:
        table["flags"] = flags


class OldForm(CheckpointError):
    """A config.json from before its class had a part for the language model."""


def read_config(config: Mapping[str, Any], folder: Path | None = None) -> Any:
    """The config object of transformers for the content of a config.json.

    Args:
        folder: the checkpoint, whose own code is run; None: a class of transformers.

    Raises:
        OldForm: the language model's fields stand outside the section that the class has for them.
        CheckpointError: transformers knows no such class, or the class refuses the config.
    """
    read = _read(config, folder)
    text = read.get_text_config()
    section = next((name for name, part in vars(read).items() if part is text), None)
    if section is not None and section not in config and "hidden_size" in config:
        raise OldForm(
            f"config.json is of an older form: {section} is missing, and the fields of the "
            "language model stand beside it.",
            'Let transformers write it anew: python -c "from transformers import AutoConfig as C; '
            "C.from_pretrained('FOLDER').save_pretrained('FOLDER')\"",
        )
    return read


def _read(config: Mapping[str, Any], folder: Path | None) -> Any:
    from transformers import AutoConfig

    model_type = str(config.get("model_type"))
    try:
        with quiet_transformers():
            if folder is not None:
                return AutoConfig.from_pretrained(
                    folder, trust_remote_code=True, local_files_only=True
                )
            # Read as a file: numbers that JSON has no word for (infinity) are written as objects.
            # Without the folder its own code is not there, and need not be spoken of.
            text = json.dumps({name: config[name] for name in config if name != "auto_map"})
            with TemporaryDirectory(prefix="growkit-config-") as place:
                Path(place, CONFIG).write_text(text, encoding="utf-8")
                return AutoConfig.from_pretrained(
                    place, trust_remote_code=False, local_files_only=True
                )
    except Exception as error:  # whatever a config class objects to
        raise CheckpointError(
            f"transformers cannot make a config of model_type {model_type!r} ({said_by(error)}).",
            "Update transformers, or pass --trust-remote-code to `growkit derive` for a class that "
            "the folder brings.",
        ) from error


def class_of_folder(config: Any, folder: Path) -> NamedClass | None:
    """The model class that a folder brings for its config; None where it names none.

    Its code is run.

    Raises:
        CheckpointError: the code is not in the folder, or fails.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = getattr(config, "auto_map", None) or {}
    reference = next((named[name] for name in AUTO_CLASSES if name in named), None)
    if reference is None:
        return None
    try:
        with quiet_transformers():
            found = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # whatever its code does
        raise CheckpointError(
            f"{folder.name} brings the class {reference!r}, which fails ({said_by(error)}).",
            "Put the files that auto_map names into the folder, and install what they import.",
        ) from error
    return NamedClass(found)


def derive_from_json(
    config: Mapping[str, Any],
    step: Step = lambda text: None,
    *,
    folder: Path | None = None,
    read: Any = None,
) -> tuple[dict[str, Any], Path]:
    """The table for the content of a config.json, and where it was kept.

    Args:
        folder: the checkpoint, whose own code is run; None: a class of transformers.
        read: what :func:`read_config` gave for it, where that is at hand.

    Raises:
        Underivable: with what was tried.
        CheckpointError: transformers knows no such class.
    """
    model_type = str(config.get("model_type"))
    if read is None:
        read = read_config(config, folder)
    own = class_of_folder(read, folder) if folder is not None else None
    table = derive(read, step, own)
    if not any("error" in proof for proof in table["operators"].values()):
        raise Underivable(
            f"No growth could be proven on a twin of {model_type!r} ("
            + "; ".join(f"{k}: {v['why']}" for k, v in list(table["operators"].items())[:2])
            + ").",
        )
    if field := misfit(table, config):
        raise Underivable(
            f"{model_type!r} could be proven for another value of {field} alone than this config's "
            f"{config.get(field)!r}.",
        )
    return table, save_table(table, cache_folder())


def table_name(table: Mapping[str, Any]) -> str:
    """File name of a table: type, and a hash of class and flags."""
    said = json.dumps([table[key] for key in ("source", "place", "flags", "kinds")], sort_keys=True)
    said += table["class"] if "kind" in table else ""
    digest = hashlib.sha256(said.encode()).hexdigest()[:10]
    return f"{file_stem(table['model_type'])}-{digest}.json"


def save_table(table: Mapping[str, Any], folder: Path) -> Path:
    """Write a table, whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    text = json.dumps(table, separators=(",", ":")) + "\n"
    return write_whole(folder / table_name(table), text)
