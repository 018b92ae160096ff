"""A study that takes seconds: a GDA of a few thousand parameters, bytes of the built-in sample."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.study.nodes import Nodes
from growkit.study.read_recipe import make_study
from growkit.study.recipe import StudyRecipe
from growkit.study.results import StudyResult
from growkit.study.run_records import Record, Records
from growkit.study.study import Study

TINY_GDA = {
    "model_type": "gda",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_noise_heads": 1,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "noise_keys": "own",
    "sub_layer_norm": True,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
STEP = 4 * 16  # tokens of an optimizer step


def values(**changes: Any) -> dict[str, Any]:
    """A base of 6 steps, and arms that cost what 12 steps of it do."""
    return copy.deepcopy(
        {
            "question": "Does it pay?",
            "seeds": [0],
            "data": {"files": "sample", "sequence_length": 16, "max_eval_tokens": 512},
            "tokenizer": {"bytes": True},
            "training": {
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "use_cpu": True,
            },
            "budget": {"tokens": 12 * STEP, "arm": "on"},
            "evaluations": 4,
            "bases": {
                "small": {
                    "config": dict(TINY_GDA),
                    "tokens": 6 * STEP,
                    "training": {"schedule": "constant"},
                }
            },
            "arms": {
                "on": {"base": "small", "training": {"schedule": "constant"}},
                "signal": {"base": "small", "grow": {"signal_heads": "x2"}},
                "scratch": {"shape_of": "signal"},
            },
            **changes,
        }
    )


def study_of(**changes: Any) -> StudyRecipe:
    return make_study(values(**changes))


def opened(folder: Path, recipe: StudyRecipe | None = None, **places: Path) -> Study:
    """A study whose untrained shapes are kept beside it."""
    return Study(recipe or study_of(), folder, places.get("runs", folder / "runs"))


def nodes_of(folder: Path, recipe: StudyRecipe | None = None, **places: Path) -> Nodes:
    return opened(folder, recipe, **places).nodes


def record_of(nodes: Nodes, key: str, loss: float = 3.0, **changes: Any) -> Record:
    """What a run with this key could have left."""
    fields: dict[str, Any] = {
        "key": key, "name": "made up", "change": None, "exactness": None, "parameters": 1,
        "flops_per_token": 1.0, "steps": 1, "tokens": 64, "learning_rate": 1e-2, "seconds": 1.0,
        "curve": [(0, 5.0), (64, loss)], "measures": {}, "series": {}, "machine": {},
        "date": "2026-11-22T10:00:00Z",
    }  # fmt: skip
    return Record(**(fields | changes))


def keep(nodes: Nodes, record: Record) -> None:
    record.write(nodes.records.own / f"{record.key}.json")


def pretend_trained(records: Records, key: str) -> None:
    """Weights and optimizer state, as far as a study looks at them."""
    model = records.runs / key / "model"
    (model / "training" / "checkpoints" / "checkpoint-6").mkdir(parents=True)
    (model / "config.json").write_text("{}")


def losses(result: StudyResult) -> dict[str, Sequence[float]]:
    return {arm.name: [run.final_loss for run in arm.runs] for arm in result.arms}
