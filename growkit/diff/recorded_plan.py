"""A plan made again from the request that a manifest records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.checkpoint import Checkpoint, identity
from growkit.core.errors import GrowkitError
from growkit.record.manifest import read_manifest
from growkit.record.plan_report import layer_sources
from growkit.surgery.plan import Plan, build_conversion_plan, plan_growth
from growkit.surgery.request import GrowthRequest
from growkit.variants.gqa.aligned import Aligned
from growkit.variants.gqa.alignment import read_alignment
from growkit.variants.request import ConversionRequest


def plan_again(source: Checkpoint, request: dict[str, Any], written: Path) -> Plan:
    """The plan of a growth or of a conversion. Raises GrowkitError when it cannot be made.

    ``written`` is the folder that was made; an alignment lies in it.
    """
    if "convert" in request:
        asked = ConversionRequest.from_mapping(request["convert"])
        conversion = asked.conversion()
        if asked.merge == "aligned":
            conversion = Aligned(conversion, read_alignment(written))
        return build_conversion_plan(source, conversion, symmetry=asked.symmetry_choice())
    if "tokenizer" in request or "add_tokens" in request:
        # The tokenizer that it grew into lies in what was written.
        request = {**request, "tokenizer": str(written)}
        request.pop("add_tokens", None)
    grow = GrowthRequest.from_mapping(request)
    plan = _plan(source, grow)
    recorded = (read_manifest(written) or {}).get("plan", {})
    if "layer_placement" not in request and any(
        recorded.get(key, sources) != sources for key, sources in layer_sources(plan).items()
    ):
        # Before there was "auto", new layers were spread evenly in every family.
        return _plan(source, replace(grow, layer_placement="even"))
    return plan


def _plan(source: Checkpoint, grow: GrowthRequest) -> Plan:
    return plan_growth(source, grow)


def recorded_plan(a: Checkpoint, b: Checkpoint, notes: list[str]) -> Plan | None:
    """The plan that made ``b`` from ``a``, made again; None, with a note, when ``a`` is not the
    parent or the plan cannot be made."""
    manifest = read_manifest(b.path)
    if manifest is None or not isinstance(manifest.get("request"), dict):
        if _is_parent(b, read_manifest(a.path)):
            notes.append("A was grown from B: give the folders in the other order to see how")
        return None
    if not _is_parent(a, manifest):
        parent = manifest.get("parent", {}).get("name")
        notes.append(f"B was grown from {parent!r}, whose config and tensors are not those of A")
        return None
    try:
        plan = plan_again(a, manifest["request"], b.path)
    except GrowkitError as error:
        notes.append(f"the growth recorded in growkit.json cannot be planned again: {error.cause}")
        return None
    written = {t.output.name: t.output.shape for t in plan.tensors}
    if written != {name: info.shape for name, info in b.tensors.items()}:
        notes.append("B no longer has the tensors that growkit.json records")
        return None
    return plan


def _is_parent(parent: Checkpoint, manifest: dict[str, Any] | None) -> bool:
    recorded = (manifest or {}).get("parent")
    if not isinstance(recorded, dict):
        return False
    return all(recorded.get(key) == value for key, value in identity(parent).items())
