"""Processes that divide sequences (``parallel.context``), by gloo on the CPU, against one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grown_runs import continue_recipe, grow, make_source
from process_runs import growkit, run, script, start
from test_launch import TORCHRUN
from training_runs import (
    TINY_GDA,
    TINY_LLAMA,
    assert_close,
    cut_back,
    figures,
    needs_sharding,
    recipe_values,
    weights,
)
from variant_checkpoints import SIZES, VARIANTS

from growkit.core.errors import UsageError
from growkit.training import train
from growkit.training.parallel import context_parallel
from growkit.training.parallel.launch import check_launch
from growkit.training.read_recipe import make_recipe

WORKER = Path(__file__).with_name("context_parallel_worker.py")
GDA = TINY_GDA | {"num_attention_heads": 8, "num_noise_heads": 2}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "llama, one key head": TINY_LLAMA,
    "window": TINY_LLAMA | {"model_type": "mistral", "sliding_window": 6},
    "qwen3": TINY_LLAMA | {"model_type": "qwen3", "head_dim": 8},
    "gda own": GDA,
    "gda shared": GDA | {"noise_keys": "shared"},
    **{name: SIZES | VARIANTS[name] | {"num_hidden_layers": 1}
       for name in ("diff_v1", "diff_v2", "gda_gated", "shared_diff", "wgqa", "sas")},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (TINY_GDA, "2: parallel.context 2 does not divide the 3 query heads"),
    "eager": (
        TINY_LLAMA | {"attn_implementation": "eager"},
        "2: Attention 'eager' of LlamaFor.* cannot",
    ),
    "longrope": (
        TINY_LLAMA | {"rope_parameters": LONGROPE},
        "1: LlamaForCausalLM does not compute the same .*logits are off",
    ),
}


def test_models_that_are_served_and_models_that_are_refused(tmp_path: Path) -> None:
    """Logits, loss and gradients of split sequences, of joined and of separate documents."""
    models = SERVED | {name: values for name, (values, _) in REFUSED.items()}
    (tmp_path / "models.json").write_text(json.dumps(models))
    run(2, [str(WORKER), str(tmp_path)], script)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: found[name] for name in SERVED} == pytest.approx(
        dict.fromkeys(SERVED, 0), abs=1e-5
    )
    for name, (_, message) in REFUSED.items():
        assert re.match(message, str(found[name])), found[name]


def documents(path: Path) -> Path:
    texts = [f"the king number {i} spoke " * (i % 3 + 1) for i in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write(path: Path, values: dict[str, Any], **parallel: Any) -> Path:
    path.write_text(yaml.safe_dump(values | {"parallel": {"context": 2, **parallel}}))
    return path


def test_two_processes_train_a_grown_model_as_one(text_file: Path, tmp_path: Path) -> None:
    """GDA, new slots first, documents kept apart, activations computed again; then resumed."""
    heads = {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2}
    grown = grow(make_source(text_file, tmp_path / "base", **heads), tmp_path / "grown")
    values = continue_recipe(
        documents(tmp_path / "rows.jsonl"), grown, train={"new_then_all": 2}, save_steps=2,
        max_steps=4, gradient_checkpointing=True,
    ).to_dict()  # fmt: skip
    values["data"] |= {"document_attention": "separate", "sequence_length": 32}
    train(make_recipe(values), tmp_path / "one")
    file = write(tmp_path / "recipe.yaml", values)
    run(2, ["train", str(file), "--out", str(tmp_path / "two")])
    assert_close(tmp_path / "two", tmp_path / "one", 1e-5)
    one, two = (tmp_path / name for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()

    before = weights(two), figures(two)
    cut_back(two, 2)
    run(2, ["train", str(file), "--out", str(two)])
    assert (weights(two), figures(two)) == before


def llama(text: Path, **training: Any) -> dict[str, Any]:
    return recipe_values(text, max_steps=3, decay_steps=0, optimizer="adamw", **training)


@needs_sharding
def test_four_processes_share_sequences_and_parameters(text_file: Path, tmp_path: Path) -> None:
    """FSDP2 over all of them, two sequences at a time; and one process goes on alone."""
    values = llama(text_file)
    train(make_recipe(values), tmp_path / "one")
    file = write(tmp_path / "recipe.yaml", values, strategy="fsdp")
    run(4, ["train", str(file), "--out", str(tmp_path / "four")])
    assert_close(tmp_path / "four", tmp_path / "one", 1e-5)


def without_exchange(arguments: Sequence[str]) -> int:
    context_parallel._exchanged = lambda tensor, group: tensor  # type: ignore[assignment]
    return growkit(arguments)


def without_border(arguments: Sequence[str]) -> int:
    """No token is the target of the last one of a stretch; and nobody looks before the first."""
    share = context_parallel.SplitSequences.share

    def cut_first(self: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = share(self, batch)
        own["shift_labels"][:, -1] = -100
        return own

    context_parallel.SplitSequences.share = cut_first  # type: ignore[method-assign]
    context_parallel.ContextCheck._compare = lambda *_: None  # type: ignore[method-assign]
    return growkit(arguments)


def test_without_the_exchange_or_the_border_it_is_another_run(
    text_file: Path, tmp_path: Path
) -> None:
    values = llama(text_file)
    file = write(tmp_path / "recipe.yaml", values)
    launch = start(2, ["train", str(file), "--out", str(tmp_path / "alone")], without_exchange)
    assert launch.wait() == [1, 1]
    said = " ".join(launch.output().split())
    assert re.search("LlamaForCausalLM does not compute the same .*logits are off by", said)
    assert "Traceback" not in said
    assert not (tmp_path / "alone" / "config.json").exists()

    train(make_recipe(values), tmp_path / "one")
    run(2, ["train", str(file), "--out", str(tmp_path / "cut")], without_border)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "cut", tmp_path / "one", 1e-3)


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({}, "1", "context is 2 and 1 process was started.*--nproc-per-node 2"),
        ({"context": 4}, "6", "context is 4 and 6 processes were started.*--nproc-per-node 4"),
        ({}, "16", "4 sequences .* cannot be shared evenly by 8"),
        ({"context": 3}, "3", "'parallel.context' 3 does not divide data.sequence_length 16"),
        ({"tensor": 2}, "4", "'parallel.context' and 'parallel.tensor' do not go together"),
    ],
)
def test_launches_that_do_not_fit(
    parallel: dict[str, Any], processes: str, message: str, text_file: Path
) -> None:
    environment = {} if processes == "1" else {**TORCHRUN, "WORLD_SIZE": processes}
    with pytest.raises(UsageError, match=message):
        values = llama(text_file) | {"parallel": {"context": 2, **parallel}}
        check_launch(make_recipe(values), environment)
