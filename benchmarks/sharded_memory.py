"""Memory of sharded training: what ``train --dry-run`` predicts beside what two processes take.

    python benchmarks/sharded_memory.py OUT.json [CASE ...]

Each case writes a random checkpoint, asks for the prediction, and trains it for two steps in two
gloo processes (FSDP2, CPU). Measured is the growth of a process's resident memory from the moment
before the model is made to its peak (VmHWM, reset by clear_refs), the larger of the two; ratios are
predicted over measured.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import yaml

LLAMA = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
GDA = {
    "model_type": "gda", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 24, "num_attention_heads": 8, "num_noise_heads": 2, "head_dim": 64,
    "num_key_value_heads": 2, "noise_keys": "shared", "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip
# config, sequence length, sequences of a process and step, further settings
CASES: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "weights": (LLAMA, 32, 1, {}),
    "large vocabulary": (LLAMA | {"vocab_size": 24576, "num_hidden_layers": 12}, 32, 1, {}),
    "activations": (LLAMA, 512, 2, {}),
    "checkpointing": (LLAMA, 512, 2, {"gradient_checkpointing": True}),
    "gda, tied": (GDA, 256, 1, {}),
    "muon": (LLAMA, 32, 1, {"optimizer": "muon"}),
}


def recipe_of(case: str, folder: Path) -> Path:
    """The folder of the model, and the recipe of a run of it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from growkit.verification.loading import register_own_models

    register_own_models()
    config, length, batch, settings = CASES[case]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text that says little\n" for i in range(4000)))
    values = {
        "model": {"checkpoint": str(folder / "model")},
        "tokenizer": {"bytes": True},
        "data": {"files": [str(text)], "sequence_length": length, "eval_fraction": 0},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 2,
            "use_cpu": True, "save_steps": 2, **settings,
        },
        "parallel": {"strategy": "fsdp", "processes": 2},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def resident(key: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def one_process(recipe: Path, out: Path) -> int:
    """Train in this process of two; by how much it grew."""
    from growkit.training import load_recipe, train
    from growkit.training.parallel import sharding

    original, base = sharding.build_sharded, [0]

    def build(*given: Any) -> Any:
        base[0] = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        return original(*given)

    sharding.build_sharded = build
    train(load_recipe(recipe), out)
    return resident("VmHWM") - base[0]


def measured(recipe: Path, out: Path) -> int:
    """The larger growth of two processes, forked from this one, which has imported everything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    children = []
    for rank in range(2):
        answer = out.with_name(f"grew-{rank}")
        children.append((os.fork(), answer))
        if children[-1][0] == 0:
            os.environ.update(
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            )  # fmt: skip
            try:
                answer.write_text(str(one_process(recipe, out)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for child, _ in children:
        os.waitpid(child, 0)
    return max(int(answer.read_text()) for _, answer in children)


def main() -> None:
    """Measure the cases, and write what came out beside what was predicted."""
    import torch

    import growkit.training.trainer
    from growkit.advice.dry_run import dry_run
    from growkit.core.progress import Silent
    from growkit.training import load_recipe

    torch.set_num_threads(1)
    assert growkit.training.trainer is not None
    target = Path(sys.argv[1])
    done = json.loads(target.read_text())["cases"] if target.is_file() else {}
    for case in sys.argv[2:] or CASES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            recipe = recipe_of(case, folder)
            plan = dry_run(
                load_recipe(recipe), folder / "out", resume="auto", overwrite=False,
                reporter=Silent(),
            )  # fmt: skip
            found = measured(recipe, folder / "out")
        ratio = round(plan.memory.peak / found, 3)
        done[case] = {"predicted": plan.memory.to_dict(), "measured": found, "ratio": ratio}
        print(case, done[case], flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        content = {"processes": 2, "versions": versions, "cases": done}
        target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
