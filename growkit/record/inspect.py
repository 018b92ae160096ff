"""What a checkpoint is: family, axes, heads per group, lambda per layer, what can grow."""

from __future__ import annotations

import math
from typing import Any

from growkit.checkpoint import Checkpoint, check_unquantised
from growkit.families import family_of
from growkit.record.cost import cost_of
from growkit.record.manifest import read_manifest
from growkit.record.plan_report import cost_context, main_dtype, stored_dtypes
from growkit.surgery.effect import ModelShape, growable
from growkit.surgery.lambdas import check_lambdas, layer_lambdas
from growkit.surgery.operators import axis_labels


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON-able description of a checkpoint; reads headers, config and lambda vectors only."""
    check_unquantised(checkpoint)
    family = family_of(checkpoint.config, checkpoint.tensors)
    sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
    dtypes = stored_dtypes(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    family.check_tensors(shapes, sizes, checkpoint.path)
    config = checkpoint.config
    cost = cost_of(family, sizes, main_dtype(dtypes), cost_context(config), config)
    report: dict[str, Any] = {
        "family": family.name,
        **({"family_origin": family.origin} if family.origin else {}),
        "model_type": checkpoint.config.get("model_type"),
        "axes": {
            axis: {"label": label, "size": sizes[axis]}
            for axis, label in axis_labels(sizes).items()
            if axis in sizes
        },
        "tied_embeddings": bool(sizes["tied"]),
        "cost": cost.to_dict(),
        "dtypes": dtypes,
        "tensors": len(checkpoint.tensors),
        "shards": list(checkpoint.shards),
        "bytes": checkpoint.total_size,
        "can_grow": growable(ModelShape(family, sizes, checkpoint.config)),
    }
    if "signal_head" in sizes:
        signal, noise = sizes["signal_head"], sizes["noise_head"]
        divisor = math.gcd(signal, noise)
        report["heads"] = {
            "signal": signal,
            "noise": noise,
            "ratio": f"{signal // divisor}:{noise // divisor}",
            "groups": min(signal, noise),
            "sub_layer_norm": bool(sizes.get("sub_layer_norm")) or family.gainless_head_norm,
        }
        report["layers"] = layer_lambdas(checkpoint, family, sizes["layer"])
        check_lambdas(family, report["layers"])
    manifest = read_manifest(checkpoint.path, tolerant=True)
    if manifest is not None:
        report["grown_from"] = (manifest.get("parent") or {}).get("name")
        report["growths"] = len(manifest.get("lineage", [])) + 1
    return report
