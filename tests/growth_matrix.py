"""The growth matrix: every family x every operator x how the checkpoint is built.

A cell is grown through the public path, loaded by transformers alone, and its measured logit
difference is held against the exactness that its plan promises. ``covering`` picks few cells in
which every pair of properties still occurs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import tiny_checkpoints as tiny
import torch
from family_checkpoints import (
    BIASES,
    EXPERTS,
    FAMILIES,
    LAYER_NORM_FAMILIES,
    family_config,
    layer_norm_config,
    write_checkpoint,
    write_t5,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from growkit.growing import grow_checkpoint
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest
from growkit.verification.loading import load_model, register_own_models
from growkit.verification.model_inputs import arguments, depth
from growkit.verification.tolerance import tolerance
from growkit.verification.written_folder import open_folder

DIFFERENTIAL = ("gda", "motif", "diffllama")
T5 = ("t5", "t5 gated")
ALL_FAMILIES = (*FAMILIES, *LAYER_NORM_FAMILIES, *T5, *DIFFERENTIAL)
KV_HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARDS = {"single": 1, "sharded": 3}

Request = dict[str, Any]
# Name in the table -> what is asked for.
OPERATORS: dict[str, Request] = {
    "--heads x2": {"heads": "x2"},
    "--heads x2, zero": {"heads": "x2", "new_heads": "zero"},
    "--query-heads x2": {"query_heads": "x2"},
    "--query-heads x2, zero": {"query_heads": "x2", "new_heads": "zero"},
    "--kv-heads x2": {"kv_heads": "x2"},
    "--signal-heads x2": {"signal_heads": "x2"},
    "--signal-heads x2, zero": {"signal_heads": "x2", "new_heads": "zero"},
    "--noise-heads x2": {"noise_heads": "x2"},
    "--uniform-heads x2": {"uniform_heads": "x2"},
    "--ffn x2": {"ffn": "x2"},
    "--ffn +8, zero": {"ffn": "+8", "new_units": "zero"},
    "--ffn x2, even": {"ffn": "x2", "symmetry": "even"},
    "--ffn x2, noise": {"ffn": "x2", "symmetry": "noise"},
    "--hidden x2": {"hidden": "x2"},
    "--hidden x4": {"hidden": "x4"},
    "--hidden +8": {"hidden": "+8"},
    "--head-dim +4": {"head_dim": "+4"},
    "--layers +2": {"layers": "+2"},
    "--layers, stack": {"layers": "x2", "depth_method": "stack"},
    "--layers, interpolate": {"layers": "+1", "depth_method": "interpolate"},
    "--layers, solar": {"layers": "+2", "depth_method": "solar"},
    "--decoder-layers +2": {"decoder_layers": "+2"},
    "--experts": {"experts": "x4"},
    "--untie-embeddings": {"untie_embeddings": True},
    "together": {"ffn": "x2", "hidden": "x2", "layers": "+1"},
}

# In the LayerNorm families heads fill the hidden size: what has to grow beside it (3 layers).
WITH_LAYER_NORM: dict[str, Request] = {
    "--heads x2": {"hidden": "x2"},
    "--heads x2, zero": {"hidden": "x2"},
    "--hidden x2": {"heads": "x2"},
    "--hidden x4": {"heads": "x4"},
    "--hidden +8": {"heads": "+1"},
    "--head-dim +4": {"hidden": "+16"},
    "--layers, solar": {"layers": "+1"},
    "together": {"heads": "x2"},
}


@dataclass(frozen=True)
class Cell:
    """One growth of one checkpoint. ``attention``: MHA, GQA or MQA."""

    family: str
    operator: str
    tied: bool
    attention: str
    bias: bool
    dtype: str
    files: str

    @property
    def request(self) -> Request:
        request = OPERATORS[self.operator]
        if self.family in EXPERTS and "experts" in request:
            return {"experts": "x2"}
        if self.family in LAYER_NORM_FAMILIES:
            return request | WITH_LAYER_NORM.get(self.operator, {})
        return request

    @property
    def name(self) -> str:
        parts = ("tied" if self.tied else "untied", self.attention, "bias" if self.bias else "")
        return " ".join((self.family, self.operator, *filter(None, parts), self.dtype, self.files))


# -- which cells there are -------------------------------------------------------------------------


def families_of(operator: str) -> tuple[str, ...]:
    """Families that allow the operator; the test asks the plans of all others for a refusal."""
    differential = operator.startswith(("--signal", "--noise", "--uniform"))
    if differential:
        return DIFFERENTIAL
    families: Iterable[str] = ALL_FAMILIES
    if "query-heads" in operator or operator.startswith("--heads"):
        families = [family for family in families if family not in DIFFERENTIAL]
    if "query-heads" in operator or operator in ("--kv-heads x2", "--untie-embeddings"):
        families = [family for family in families if family not in T5]
    if "query-heads" in operator or operator == "--kv-heads x2":
        families = [family for family in families if family not in LAYER_NORM_FAMILIES]
    if operator == "--head-dim +4":
        families = ["phi3", *T5, *LAYER_NORM_FAMILIES]
    if "heads x2, zero" in operator:
        # A norm over all heads: only whole copies of all of them keep it.
        families = [family for family in families if not family.startswith("olmo")]
    if operator.endswith("zero") and "ffn" in operator:
        families = [family for family in families if family != "motif"]  # PolyNorm
    if operator == "--decoder-layers +2":
        families = T5
    if operator.startswith("--ffn +"):  # one number for two widths: experts and shared expert
        families = [family for family in families if family != "qwen2_moe"]
    if operator == "--experts":
        families = [
            family
            for family in families
            if family in ("llama", "mistral", "qwen2", "qwen3", *EXPERTS)
        ]
    return tuple(families)


def attentions(family: str, operator: str) -> tuple[str, ...]:
    """Head groupings that the family has and the operator can grow."""
    if family in (*T5, *LAYER_NORM_FAMILIES):
        return ("MHA",)
    if operator == "--kv-heads x2":
        return ("GQA", "MQA")  # every query head has one of its own already
    return tuple(KV_HEADS)


@cache
def cells(family: str, operator: str) -> tuple[Cell, ...]:
    """All cells of one family and operator."""
    if family not in families_of(operator):
        return ()
    ties = (True,) if operator == "--untie-embeddings" else (True, False)
    biases = (False, True) if family in BIASES else (False,)
    if (family, operator) == ("llama", "--experts"):
        biases = (False,)  # MixtralConfig has none
    return tuple(
        Cell(family, operator, *levels)
        for levels in product(ties, attentions(family, operator), biases, DTYPES, SHARDS)
    )


def full_matrix() -> list[Cell]:
    return [cell for f in ALL_FAMILIES for operator in OPERATORS for cell in cells(f, operator)]


@cache
def pairs(cell: Cell) -> frozenset[tuple[tuple[str, Any], ...]]:
    """Every two properties that occur together in a cell."""
    return frozenset(combinations(vars(cell).items(), 2))


def covering() -> list[Cell]:
    """Cells in which every pair of properties that the full matrix has occurs at least once.

    Greedy and without chance: one cell for each family and operator, the one that shows most pairs
    not yet seen, and further cells while a pair is missing.
    """
    everything = full_matrix()
    missing: set[Any] = set().union(*map(pairs, everything))
    chosen: list[Cell] = []

    def take(candidates: Sequence[Cell]) -> None:
        best = max(candidates, key=lambda cell: len(pairs(cell) & missing))
        missing.difference_update(pairs(best))
        chosen.append(best)

    for family in ALL_FAMILIES:
        for operator in OPERATORS:
            if candidates := cells(family, operator):
                take(candidates)
    while missing:
        take(everything)
    return chosen


# -- running them ----------------------------------------------------------------------------------


def write_source(path: Path, cell: Cell) -> Path:
    """The checkpoint of a cell, as transformers (Motif: by hand) writes it."""
    kv, dtype = KV_HEADS[cell.attention], DTYPES[cell.dtype]
    if cell.family in T5:
        kind = "v1.0" if cell.tied else "v1.1"
        gated = "gated-gelu" if cell.family == "t5 gated" else "relu"
        write_t5(path, kind, dtype, feed_forward_proj=gated)
    elif cell.family in DIFFERENTIAL:
        _write_differential(path, cell, kv)
    elif cell.family in LAYER_NORM_FAMILIES:
        config = layer_norm_config(cell.family, tie_word_embeddings=cell.tied)
        write_checkpoint(path, config, dtype)
    else:
        config = family_config(
            cell.family,
            bias=cell.bias,
            tie_word_embeddings=cell.tied,
            num_key_value_heads=kv,
        )
        write_checkpoint(path, config, dtype)
    if SHARDS[cell.files] > 1:
        _shard(path, SHARDS[cell.files])
    return path


def _write_differential(path: Path, cell: Cell, kv: int) -> None:
    own = {"tie_word_embeddings": cell.tied, "num_hidden_layers": 4}
    made = {
        "gda": lambda: tiny.gda_config(8, 4, kv, **own),
        "motif": lambda: tiny.motif_config(4, 4, kv, **own),
        "diffllama": lambda: tiny.diffllama_config(8, 2 * kv, **own),
    }[cell.family]()
    tiny.make_folder(path, made, "F32" if cell.dtype == "float32" else "BF16")


def _shard(folder: Path, count: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[shard::count])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.inference_mode()
def logits_of(folder: Path) -> tuple[torch.Tensor, int]:
    """Logits in float32, and the depth; nothing may be missing, unexpected or of another shape."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"].lower() == "motif":  # no class of transformers has this name
        model: Any = load_model(open_folder(folder), torch.float32)
    else:
        auto = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
        # Strict validation has passed; now no key may be left over on either side.
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
        assert not info["mismatched_keys"] and not info.get("error_msgs"), info
        model.eval()
    ids = torch.arange(80).reshape(2, 40) * 7 % 256
    return model(**arguments(model, ids)).logits, depth(model)


@dataclass(frozen=True)
class Result:
    """What a cell showed: largest |d logit|, the tolerance it is held to, rms of the logits."""

    cell: Cell
    exactness: str
    difference: float
    allowed: float
    rms: float

    def check(self) -> None:
        """Raise AssertionError unless the measured difference is what the label promises."""
        at_most = {
            # Zeros may still change the order in which a longer sum is taken.
            "bit-exact": 0.0 if "layers" in self.cell.operator else self.allowed / 4,
            "exact": self.allowed,
            "rounded": self.allowed,
        }
        if self.exactness == "not-exact":
            assert self.difference > 10 * self.allowed, self
        else:
            assert self.difference <= at_most[self.exactness], self


class Matrix:
    """Runs cells; sources and their logits are made once."""

    def __init__(self, folder: Path) -> None:
        register_own_models()
        self.folder = folder
        self._sources: dict[Any, tuple[Path, torch.Tensor, int]] = {}

    def source(self, cell: Cell) -> tuple[Path, torch.Tensor, int]:
        key = replace(cell, operator="")
        if key not in self._sources:
            path = write_source(self.folder / f"source-{len(self._sources)}", cell)
            self._sources[key] = (path, *logits_of(path))
        return self._sources[key]

    def grow(self, cell: Cell, out: Path, **further: Any) -> Plan:
        """Plan and write, through the public path."""
        shard = "20KB" if cell.files == "sharded" else "5GB"
        request = GrowthRequest(**cell.request | further)
        plan, _ = grow_checkpoint(
            self.source(cell)[0],
            out,
            request,
            verify=False,
            overwrite=True,
            threads=1,
            max_shard_size=shard,
        )
        return plan

    def run(self, cell: Cell) -> Result:
        """Grow a cell, load the result, measure."""
        plan = self.grow(cell, out := self.folder / "grown")
        written = {info.dtype for info in plan.checkpoint.tensors.values()}
        assert {"F32" if cell.dtype == "float32" else "BF16"} <= written
        return self.measure(cell, plan, out)

    def measure(self, cell: Cell, plan: Plan, out: Path) -> Result:
        """Compare a written folder with the source."""
        _, old, layers = self.source(cell)
        new, grown_layers = logits_of(out)
        rms = float(old.double().square().mean().sqrt())
        allowed = tolerance(
            rms,
            max(layers, grown_layers),
            torch.float32,
            storage=DTYPES[cell.dtype],
            storage_rounding=plan.exactness.value == "rounded",
        )
        difference = float((new.double() - old.double()).abs().max())
        return Result(cell, plan.exactness.value, difference, allowed, rms)


def forget(folder: Path) -> None:
    """Remove the sources and results of a matrix."""
    shutil.rmtree(folder, ignore_errors=True)
