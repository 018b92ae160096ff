# SPDX-License-Identifier: Apache-2.0
"""Is the folder already what a growth would write? Asked when it is there before the growth begins.

A growth that failed or was killed after its folder had got its name has done its work; whoever
repeats the command is told so. Only the bytes can tell: another source of the same shapes has the
same manifest. So the plan is carried out once more, and every byte is compared instead of written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from filecmp import cmp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint import ShardPlan, open_checkpoint, staging
from growkit.checkpoint.writer import DifferentError, ShardComparison
from growkit.core.errors import GrowkitError
from growkit.record.manifest import MANIFEST, expanded, manifest_text, read_manifest
from growkit.surgery.execute import execute
from growkit.surgery.plan import Plan

if TYPE_CHECKING:
    from growkit.optimizer_state.write import GrownState

_WRITTEN_BY_US = ("auto_map", "growkit")  # in config.json, beside the plan's own


def finished_output(
    plan: Plan,
    out: Path,
    manifest: dict[str, Any],
    shard_plan: ShardPlan,
    *,
    verify: bool,
    optimizer: GrownState | None = None,
    side_files: Mapping[str, bytes] | None = None,
    threads: int | None = None,
) -> dict[str, Any] | None:
    """The manifest of ``out`` if the same growth has written that folder, whole; else None.

    Args:
        manifest: what the growth would write, not verified yet: parent, request and plan are
            compared, and the version of growkit.
        verify: whether the growth would be verified; then ``out`` has to be.
        optimizer, side_files: what the growth would write beside the weights.

    The marker of an unfinished publication is removed from a folder that is recognised.
    """
    found = read_manifest(out) if (out / MANIFEST).is_file() else None
    expected = expanded(json.loads(manifest_text(manifest)), MANIFEST) | {"verification": None}
    if found is None or found | {"verification": None} != expected:
        return None
    if verify and not found.get("verification"):
        return None
    try:
        with open_checkpoint(out) as written:  # refuses a folder whose files do not fit together
            config = written.config
        if _without(config) != json.loads(json.dumps(_without(plan.config))):
            return None
        with ShardComparison(out, shard_plan) as comparison:
            execute(plan, comparison, threads=threads)
        if optimizer is not None:
            from growkit.optimizer_state.store import FOLDER

            optimizer.compare(out / FOLDER, threads=threads)
        source = plan.checkpoint.path
        for name in manifest.get("copied_files", []):
            if not (out / name).is_file() or not cmp(source / name, out / name, shallow=False):
                return None
        for name, content in (side_files or {}).items():
            if not (out / name).is_file() or (out / name).read_bytes() != content:
                return None
    except (GrowkitError, DifferentError):
        return None
    staging.remove_marker(out)
    return found


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _WRITTEN_BY_US}
