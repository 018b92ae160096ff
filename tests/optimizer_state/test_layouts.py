"""State as the libraries really write it: Trainer, accelerate, FSDP2 full and sharded, our own."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from process_runs import run as start_processes
from process_runs import script
from state_runs import GDA, LLAMA, Run, grow, load, loss_of, run, steps, stored, two_groups

from growkit.core.errors import CheckpointError, UsageError
from growkit.optimizer_state.find import find_state
from growkit.optimizer_state.source import OptimizerState

TIED = tiny.llama_config(4, 2, tie_word_embeddings=True)


def truth(model: Any, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """State by name, from the live objects."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


def agree(state: OptimizerState, wanted: dict[str, dict[str, Any]]) -> None:
    assert state.parameters.keys() == wanted.keys()
    for name, entries in wanted.items():
        found = state.parameters[name]
        assert found.step == (float(entries["step"]) if "step" in entries else None)
        kinds = set(entries) - {"step"}
        assert found.moments.keys() == kinds
        for kind in kinds:
            values = np.array(found.moments[kind].read())
            assert values.any()
            assert values.tobytes() == entries[kind].contiguous().numpy().tobytes(), (name, kind)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "start", TIED)


def test_trainer(model_folder: Path, tmp_path: Path) -> None:
    """transformers' own Trainer with its decay and no-decay groups; tied weights stand once."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (12, 8))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=2,
        save_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert [len(g["params"]) for g in trainer.optimizer.param_groups] == [15, 5]
    state = find_state(tmp_path / "trainer" / "checkpoint-3")
    assert state is not None and state.layout == "trainer" and state.step == 3
    agree(state, truth(model, trainer.optimizer.optimizer))
    manifest = grow(tmp_path / "trainer" / "checkpoint-3", tmp_path / "grown", heads="x2")
    assert manifest["optimizer_state"]["tensors"] == {"copied": 12, "grown": 8}
    assert not (tmp_path / "grown" / "optimizer.pt").exists()


def test_accelerate_folder_without_config(model_folder: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = load(model_folder).float()
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    list(steps(model, optimizer, 0, 2))
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=True)
    state = find_state(model_folder, tmp_path / "state")
    assert state is not None and state.layout == "accelerate"
    agree(state, truth(model, optimizer.optimizer))
    manifest = grow(model_folder, tmp_path / "grown", ffn="x2", optimizer_from=tmp_path / "state")
    assert manifest["optimizer_state"]["source"]["file"] == "optimizer.bin"
    with pytest.raises(UsageError, match="no optimizer state"):
        find_state(model_folder, tmp_path / "start")


def test_two_optimizers_of_accelerate(tmp_path: Path) -> None:
    """Muon for the matrices of the layers, AdamW for the rest: optimizer.bin, optimizer_1.bin."""
    from accelerate import Accelerator

    folder = tiny.make_folder(tmp_path / "start", GDA)
    accelerator = Accelerator(cpu=True)
    model = load(folder).float()
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in named if p.ndim != 2 or "layers" not in n]
    model, muon, adamw = accelerator.prepare(
        model, torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)
    )
    for step in range(2):
        loss_of(model, step).backward()
        muon.step()
        adamw.step()
        model.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    shutil.copyfile(folder / "config.json", tmp_path / "state" / "config.json")
    state = find_state(tmp_path / "state")
    assert state is not None and state.kinds == ("exp_avg", "momentum_buffer", "exp_avg_sq")
    muon, adamw = muon.optimizer, adamw.optimizer
    agree(state, {n: dict(muon.state[p] if p in muon.state else adamw.state[p]) for n, p in named})
    grow(tmp_path / "state", tmp_path / "grown", signal_heads="x2", symmetry="even")
    name = "model.layers.0.self_attn.q_proj.weight"
    buffers = stored(tmp_path / "grown")[name]
    assert buffers.keys() == {"momentum_buffer"}
    # [s0 s1 | n0] -> [s0 s0 s1 s1 | n0], head_dim 4
    old = state.parameters[name].moments["momentum_buffer"].read()
    grown = buffers["momentum_buffer"].numpy()
    assert np.array_equal(grown[0:4], old[0:4] / 2) and np.array_equal(grown[4:8], old[0:4] / 2)
    assert np.array_equal(grown[16:20], old[8:12])


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes save; and a grown folder whose state they load."""
    folder = tmp_path_factory.mktemp("fsdp")
    source = run(folder / "run", LLAMA, done=2).folder
    grow(source, folder / "grown", hidden="x2")
    worker = Path(__file__).with_name("fsdp_worker.py")
    start_processes(2, [str(worker), str(source), str(folder), str(folder / "grown")], script)
    return folder


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT", "PLAIN"])
def test_fsdp(kind: str, fsdp: Path, tmp_path: Path) -> None:
    found = torch.load(fsdp / "found.pt", weights_only=True)
    state = find_state(fsdp / "run", fsdp / kind)
    assert state is not None
    agree(state, found["whole"])
    assert {tuple(group["betas"]) for group in state.groups} == {(0.9, 0.98)}
    manifest = grow(fsdp / "run", tmp_path / "grown", query_heads="x2", optimizer_from=fsdp / kind)
    assert manifest["optimizer_state"]["tensors"] == {"copied": 17, "grown": 4}


def test_sharded_parameters_get_their_part(fsdp: Path) -> None:
    loaded = torch.load(fsdp / "found.pt", weights_only=True)["loaded"]
    wanted = stored(fsdp / "grown")
    assert loaded.keys() == wanted.keys()
    for name, entries in loaded.items():
        assert entries["step"] == 2
        assert torch.equal(entries["exp_avg"], wanted[name]["exp_avg"].to(torch.float32))


def test_folder_of_weights_alone_is_no_state(fsdp: Path) -> None:
    with pytest.raises(UsageError, match="no optimizer state"):
        find_state(fsdp / "run", fsdp / "WEIGHTS")


def test_hostile_index_is_not_run(fsdp: Path, tmp_path: Path) -> None:
    """The index of a sharded checkpoint is a pickle; it may be of a stranger."""
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "was-run"),))

    shutil.copytree(fsdp / "PLAIN", tmp_path / "state")
    (tmp_path / "state" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"mkdir, which no index of tensors needs"):
        find_state(fsdp / "run", tmp_path / "state")
    assert not (tmp_path / "was-run").exists()


def test_lost_shard_is_named(fsdp: Path, tmp_path: Path) -> None:
    shutil.copytree(fsdp / "SHARDED_STATE_DICT", tmp_path / "state")
    (tmp_path / "state" / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"--optimizer-state reset"):
        grow(fsdp / "run", tmp_path / "grown", ffn="x2", optimizer_from=tmp_path / "state")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


@pytest.fixture
def source(tmp_path: Path) -> Run:
    return run(tmp_path / "run", LLAMA, done=2)


def change(source: Run, **entries: Any) -> None:
    content = copy.deepcopy(source.optimizer.state_dict())
    content["state"][0] |= entries
    torch.save(content, source.folder / "optimizer.pt")


def test_state_that_cannot_be_grown_is_refused(source: Run, tmp_path: Path) -> None:
    for entries, message in (
        ({"exp_avg_sq_row": torch.ones(3)}, "keeps 'exp_avg_sq_row'"),
        ({"exp_avg": torch.ones(3)}, "assigned"),
        ({"exp_avg_sq": torch.ones(3)}, "exp_avg_sq of 'model.embed_tokens.weight'"),
        ({"exp_avg_sq": torch.ones(256, 16, dtype=torch.uint8)}, "dtype torch.uint8"),
    ):
        change(source, **entries)
        with pytest.raises(CheckpointError, match=message):
            grow(source.folder, tmp_path / "grown", ffn="x2")
        assert not (tmp_path / "grown").exists()
    manifest = grow(source.folder, tmp_path / "grown", ffn="x2", optimizer_state="reset")
    assert "optimizer_state" not in manifest
    assert not (tmp_path / "grown" / "growkit_optimizer").exists()


def test_damaged_and_foreign_files(source: Run, tmp_path: Path) -> None:
    path = source.folder / "optimizer.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_state(source.folder)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not the state of a torch optimizer"):
        find_state(source.folder)
    path.unlink()
    assert find_state(source.folder) is None
    (source.folder / "global_step12").mkdir()
    with pytest.raises(CheckpointError, match="global_step12"):
        find_state(source.folder)
    with pytest.raises(UsageError, match="There is no folder"):
        find_state(source.folder, tmp_path / "nowhere")
    shutil.rmtree(source.folder / "global_step12")
    with pytest.raises(UsageError, match="there is no optimizer state beside"):
        grow(source.folder, tmp_path / "grown", ffn="x2", optimizer_state="grow")


def test_bfloat16_moments(tmp_path: Path) -> None:
    source = run(tmp_path / "run", LLAMA, done=2)
    content = source.optimizer.state_dict()
    for entries in content["state"].values():
        for kind in ("exp_avg", "exp_avg_sq"):
            entries[kind] = entries[kind].bfloat16()
    torch.save(content, source.folder / "optimizer.pt")
    grow(source.folder, tmp_path / "grown", heads="x2", symmetry="even")
    state = find_state(tmp_path / "grown")
    assert state is not None
    moment = state.parameters["model.layers.1.self_attn.q_proj.weight"].moments["exp_avg_sq"]
    assert moment.dtype == "BF16"
    position = [n for n, _ in source.model.named_parameters()].index(
        "model.layers.1.self_attn.q_proj.weight"
    )
    old = content["state"][position]["exp_avg_sq"].float().numpy()
    assert np.array_equal(moment.read()[:4].astype(np.float32), old[:4] / 4)
