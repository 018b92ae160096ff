"""mergekit's passthrough on the tiny models that growkit derives from: what loads and is the same.

Run in an environment that has growkit and mergekit: each causal language model of transformers is
made small (:func:`growkit.derive.twin.make_twin`), saved with random weights, its last layer is
appended once more by a passthrough merge with the usual output projections at scale 0 (the recipe
of LLaMA-Pro), and the result is loaded in transformers and compared, as growkit's own proofs are.

    python benchmarks/coverage/mergekit_depth.py benchmarks/coverage/mergekit.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.derive.builder import Builder, said_by, token_ids
from growkit.derive.proof import TOLERANCE
from growkit.derive.stored import StoredModel, relative_error
from growkit.derive.studied import explicit
from growkit.derive.twin import make_twin
from growkit.verification.loading import quiet_transformers

SECONDS = 120
# Parts of the names of what writes the residual stream, in the classes of transformers.
OUTPUTS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "fc2",
    "fc_out",
    "dense_4h_to_h",
    "attention.dense",
    "attn.dense",
    "output_linear",
)


def recipe(source: Path, layers: int) -> MergeConfiguration:
    """All layers, and the last one again with zero outputs."""
    filters = [{"filter": name, "value": 0.0} for name in OUTPUTS]
    again = {"model": str(source), "layer_range": [layers - 1, layers]}
    return MergeConfiguration.model_validate(
        {
            "merge_method": "passthrough",
            "dtype": "float32",
            "slices": [
                {"sources": [{"model": str(source), "layer_range": [0, layers]}]},
                {"sources": [again | {"parameters": {"scale": [*filters, {"value": 1.0}]}}]},
            ],
        }
    )


def load(folder: Path) -> Any:
    """The folder's model; raises where a tensor is missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, info[kind])):
            raise ValueError(f"{kind.replace('_', ' ')}: {wrong[0]}")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids(model), use_cache=False).logits.float()
    return found


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """An alarm that ends what takes too long."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def one(model_type: str, work: Path) -> dict[str, Any]:
    """``source``, ``merge``, ``load`` or ``compare`` with what failed there; or ``error``."""
    at = "source"
    try:
        with limited(), quiet_transformers():
            config = AutoConfig.for_model(model_type)
            builder = Builder(config, AutoModelForCausalLM)
            values, layers = make_twin(builder, explicit(builder, config))
            twin = StoredModel(builder, values)
            twin.randomise()
            twin.model.save_pretrained(work / "a")
            wanted = logits(load(work / "a"))
            at = "merge"
            options = MergeOptions(copy_tokenizer=False, allow_crimes=True, quiet=True)
            run_merge(recipe(work / "a", layers.count), str(work / "b"), options)
            at = "load"
            model = load(work / "b")
            deeper = model.config.get_text_config().num_hidden_layers
            if deeper != layers.count + 1:
                raise ValueError(f"num_hidden_layers is {deeper} after {layers.count} + 1")
            at = "compare"
            error = relative_error(logits(model), wanted)
            if not error <= TOLERANCE:
                raise ValueError(f"the logits differ (relative error {error:.2g})")
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        said = said_by(failure) if isinstance(failure, Exception) else repr(failure)
        return {"failed": at, "why": said.replace(str(work), "")}
    return {"error": float(f"{error:.2g}")}


def main() -> int:
    """Adds what the report lacks; the exit code is 0 even where types fail."""
    report = Path(sys.argv[1])
    found = json.loads(report.read_text()) if report.is_file() else {}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    versions = {name: version(name) for name in ("mergekit", "transformers", "torch")}
    types: dict[str, Any] = found.setdefault("types", {})
    found["versions"] = versions
    for model_type in sys.argv[2:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in types:
            continue
        with tempfile.TemporaryDirectory(prefix="mergekit-depth-") as work:
            types[model_type] = one(model_type, Path(work))
        print(model_type, types[model_type], flush=True)
        counted = [entry for entry in types.values() if entry.get("failed") != "source"]
        found["counts"] = {
            "made": len(counted),
            "merged": sum(entry.get("failed") != "merge" for entry in counted),
            "load": sum(entry.get("failed") not in ("merge", "load") for entry in counted),
            "load and keep the logits": sum("error" in entry for entry in counted),
        }
        report.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
