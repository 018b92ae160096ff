"""A staged recipe, and a program that runs it in children that it kills."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from training_runs import TINY_GDA, recipe_values

STAGES: list[dict[str, Any]] = [
    {"at": {"steps": 4}, "grow": {"signal_heads": "x2"}},
    {"at": {"tokens": 8 * 4 * 16}, "grow": {"ffn": "x1.5", "layers": "+1"}, "warmup_steps": 2},
]


def staged_values(text: Path, stages: list[dict[str, Any]] | None = None, **training: Any) -> Any:
    """12 steps of 2 x 2 sequences of 16 tokens; growths at steps 4 and 8."""
    values = recipe_values(
        text, schedule="constant", warmup_steps=1, eval_steps=3, save_steps=3, **training
    )
    values["model"]["config"] = dict(TINY_GDA)
    values["stages"] = STAGES if stages is None else stages
    return values


def wait_and_kill(child: int, wish: dict[str, Any], out: Path) -> bool:
    """Kill a child when its time has come; False when it finished before."""
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the run ended with {status}"
            return False
        exists = "exists" in wish and (out / wish["exists"]).exists()
        if exists or time.monotonic() - begun > wish.get("seconds", 1e9):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0005)


def main() -> None:
    """argv: recipe, out, wishes. Prints how many children were killed before one finished."""
    from growkit.training import load_recipe
    from growkit.training.run import train

    recipe, out, wishes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    import growkit.optimizer_state.find
    import growkit.training.growth.stages
    import growkit.training.trainer
    import growkit.verification.comparison  # noqa: F401  imported once, not in every child

    killed = []
    for wish in [*wishes, {}]:
        child = os.fork()
        if child == 0:
            try:
                os.fsync = lambda descriptor: None
                train(load_recipe(recipe), out)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        if not wait_and_kill(child, wish, out):
            break
        killed.append(wish)
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
