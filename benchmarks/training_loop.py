"""`growkit train` beside a plain PyTorch loop and transformers' Trainer.

    python benchmarks/training_loop.py --json benchmarks/results/training-loop.json

The same Llama from scratch on the built-in text. Three programs, each in a process of its own, in
turn within every round:

* ``plain``: the model, packed sequences of the same length, fused AdamW, clipped gradients, a
  constant rate: the loop that one writes by hand;
* ``trainer``: transformers' Trainer on the same sequences, tokenised by the same tokenizer;
* ``growkit``: the recipe, by ``growkit.training.train``.

Seconds a step are the median over the later half of the steps, of CPU time, since the machine may
be shared. The first step is counted from the start of the process: imports, tokenising, one batch.
Peak memory is the kernel's, of the process. ``--threads 2`` counts the CPU seconds of both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine

SHAPES = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4},
    "10M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 8, "heads": 5},
}
LENGTH, BATCH, RATE, CLIP = 256, 8, 1e-3, 1.0


def config(shape: dict[str, int]) -> dict[str, Any]:
    heads = shape["heads"]
    return {key: value for key, value in shape.items() if key != "heads"} | {
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": shape["hidden_size"] // heads,
        "vocab_size": 257,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    }


class Clock:
    """Times after every step, in CPU seconds and in seconds since the process began."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def tick(self) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.time())

    def figures(self, begun: float) -> dict[str, float]:
        half = len(self.cpu) // 2
        steps = [b - a for a, b in zip(self.cpu[half:-1], self.cpu[half + 1 :], strict=True)]
        return {
            "step_cpu": statistics.median(steps),
            "first_cpu": self.cpu[0],
            "first_seconds": self.wall[0] - begun,
            "step_seconds": statistics.median(
                b - a for a, b in zip(self.wall[half:-1], self.wall[half + 1 :], strict=True)
            ),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def sequences() -> Any:
    """Packed sequences of the built-in text, int64 [sequences, LENGTH], by the same tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from growkit.data.tokenizer import train_bpe
    from growkit.samples import sample_text

    with tempfile.TemporaryDirectory() as folder:
        train_bpe([], 257, Path(folder))
        ids = AutoTokenizer.from_pretrained(folder)(sample_text())["input_ids"]
    rows = len(ids) // LENGTH
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


def model_of(case: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config(SHAPES[case["shape"]])
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )


def plain(case: dict[str, Any], clock: Clock) -> None:
    import torch

    model, rows = model_of(case).train(), sequences()
    run = torch.compile(model) if case["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    order = torch.randperm(len(rows))
    for step in range(case["steps"]):
        ids = rows[order[(step * BATCH + torch.arange(BATCH)) % len(rows)]]
        with torch.autocast("cpu", torch.bfloat16, enabled=case["compiled"]):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def trainer(case: dict[str, Any], clock: Clock) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    rows = sequences()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model_of(case),
            args=TrainingArguments(
                output_dir=folder, max_steps=case["steps"], learning_rate=RATE, weight_decay=0.1,
                per_device_train_batch_size=BATCH, max_grad_norm=CLIP, use_cpu=True,
                lr_scheduler_type="constant", bf16=case["compiled"], optim="adamw_torch_fused",
                torch_compile=case["compiled"], save_strategy="no", report_to="none",
                logging_steps=10, disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Ticks()],
        ).train()  # fmt: skip


def growkit(case: dict[str, Any], clock: Clock) -> None:
    from growkit.core.worker import importing
    from growkit.training import train
    from growkit.training.read_recipe import make_recipe

    with importing():  # as train() does
        from growkit.training.trainer import RunTrainer

    stepped = RunTrainer.training_step

    # The end of a step is the beginning of the next one: nothing of growkit's is left out.
    def step(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step:
            clock.tick()
        return stepped(self, *given, **named)

    RunTrainer.training_step = step
    recipe = {
        "model": {"config": config(SHAPES[case["shape"]])},
        "tokenizer": {"bytes": True},
        "data": {"files": "sample", "sequence_length": LENGTH, "eval_fraction": 0},
        "training": {
            "max_steps": case["steps"] + 1, "schedule": "constant", "learning_rate": RATE,
            "per_device_train_batch_size": BATCH, "max_grad_norm": CLIP, "use_cpu": True,
            "bf16": case["compiled"], "torch_compile": case["compiled"],
            "logging_steps": 10, "save_steps": case["steps"] + 1,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(make_recipe(recipe), Path(folder) / "run")


PROGRAMS = {"plain": plain, "trainer": trainer, "growkit": growkit}


def in_own_process(program: str, case: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--run", program, json.dumps(case | {"begun": time.time()})],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(case["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["float32 eager", "bfloat16 compiled"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        program, case = options.run[0], json.loads(options.run[1])
        clock = Clock()
        PROGRAMS[program](case, clock)
        print(json.dumps(clock.figures(case["begun"])))
        return
    report: dict[str, Any] = {
        "machine": machine() | {"load": round(os.getloadavg()[0], 1)},
        "threads": options.threads,
    }
    for shape in options.shapes:
        for mode in options.modes:
            case = {
                "shape": shape,
                "compiled": "compiled" in mode,
                "steps": options.steps,
                "threads": options.threads,
            }
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
            names = list(PROGRAMS)
            for number in range(options.rounds):
                for name in names[number % 3 :] + names[: number % 3]:
                    runs[name].append(in_own_process(name, case))
                    print(f"  {shape} {mode} {name:8} {runs[name][-1]}", flush=True)
            tokens = LENGTH * BATCH

            def ratio(key: str, a: str, b: str, runs: Any = runs) -> float:
                pairs = zip(runs[a], runs[b], strict=True)
                return round(statistics.median(x[key] / y[key] for x, y in pairs), 3)

            report[f"{shape}, {mode}"] = {
                "tokens a CPU second": {
                    name: round(tokens / statistics.median(r["step_cpu"] for r in of))
                    for name, of in runs.items()
                },
                "growkit / plain, tokens a CPU second": ratio("step_cpu", "plain", "growkit"),
                "growkit / plain, tokens a second": ratio("step_seconds", "plain", "growkit"),
                "peak memory, growkit / trainer": ratio("peak_mb", "growkit", "trainer"),
                "growkit / trainer, tokens a CPU second": ratio("step_cpu", "trainer", "growkit"),
                "first step, growkit / trainer, CPU seconds": ratio(
                    "first_cpu", "growkit", "trainer"
                ),
                "runs": runs,
            }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
