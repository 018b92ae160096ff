"""A damaged run folder is used as far as it is whole, or refused by a sentence: never a traceback.

One run is made; every case damages a copy and repeats the command up to its first step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import cut_back, make

from growkit.cli.main import main
from growkit.core.errors import GrowkitError
from growkit.data.token_cache import _whole
from growkit.training import metrics, models, train
from growkit.training.checksums import checksums

RUN = "training"
LAST = f"{RUN}/checkpoints/checkpoint-6"


@pytest.fixture(scope="module")
def begun(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 6 of 12, with a final model of its end."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(make(text_file), out)
    shutil.copytree(out, out.with_name("kept"))
    cut_back(out, 6)
    for path in out.with_name("kept").iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    shutil.rmtree(out.with_name("kept"))
    (out.parent / "recipe.yaml").write_text(yaml.safe_dump(make(text_file).to_dict()))
    return out


class Reached(GrowkitError):
    """The first step of the training."""

    exit_code = 77


@pytest.fixture
def repeat(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], int]:
    def stop(*_: Any, **__: Any) -> None:
        raise Reached("The first step.")

    monkeypatch.setattr(models, "build_model", stop)  # the last thing before the first step

    def command(out: Path) -> int:
        code = main(["train", str(begun.parent / "recipe.yaml"), "--out", str(out), "--quiet"])
        said = capsys.readouterr().err
        assert "Traceback" not in said and "unexpected failure" not in said, said
        assert "use None" not in said and "'None'" not in said, said
        assert code in (1, 2, Reached.exit_code), said
        assert code == Reached.exit_code or len(said.split("error: ")) == 2, said
        return code

    return command


def agreeing(out: Path) -> None:
    """Give the manifest the sizes and checksums of what is there: only reading can tell."""
    folder = out / LAST
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    names = [name for name in manifest["files"] if (folder / name).is_file()]
    manifest["files"] = {name: (folder / name).stat().st_size for name in names}
    manifest["xxh3"] = checksums(folder, names)
    path.write_text(json.dumps(manifest))


CONTENTS = {
    "empty": b"", "null": b"null", "number": b"5", "list": b"[]", "table": b"{}", "text": b'"x"',
    "cut": b'{"step": 3, "fi', "zeros": bytes(300), "deep": b"[" * 100_000, "bytes": b"\xff\xfe",
    "digits": b'{"step": ' + b"9" * 5000 + b"}", "twice": b'{"step": 1, "step": 2}',
    "wrong": b'{"step": null, "tokens": -1, "packed": 7, "format": "x", "steps": 1e999}',
}  # fmt: skip
FILES = [
    "growkit_training.json", f"{RUN}/recipe.yaml", f"{RUN}/data.json", f"{RUN}/metrics.jsonl",
    f"{RUN}/data/file-hashes.json", f"{RUN}/data/*/meta.json", f"{LAST}/manifest.json",
    f"{LAST}/trainer_state.json", f"{LAST}/running_loss.json", f"{LAST}/config.json",
    f"{LAST}/scheduler.pt", f"{LAST}/rng_state.pth", f"{LAST}/optimizer.pt",
    f"{LAST}/model.safetensors", f"{RUN}/tokenizer/tokenizer.json",
]  # fmt: skip


def share(kinds: list[Any], number: int, parts: int) -> list[Any]:
    """Every file meets a part of the kinds; all of them where the environment asks for it."""
    return kinds if os.environ.get("GROWKIT_EVERY_DAMAGE") else kinds[number % parts :: parts]


def find(out: Path, pattern: str) -> Path:
    return next(iter(out.glob(pattern)), out / pattern.replace("*", "x"))


@pytest.mark.parametrize("name", FILES)
def test_content(name: str, begun: Path, tmp_path: Path, repeat: Callable[[Path], int]) -> None:
    """Kinds of content, in one copy."""
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    victim = find(out, name)
    victim.parent.mkdir(exist_ok=True)
    own = victim.read_bytes() if victim.exists() else None
    manifest = (out / LAST / "manifest.json").read_bytes()
    for content in share(list(CONTENTS.values()), FILES.index(name), 3):
        victim.write_bytes(content)
        if LAST in name and "manifest" not in name:
            agreeing(out)
        repeat(out)
        (out / LAST / "manifest.json").write_bytes(manifest)
        if own is not None:
            victim.write_bytes(own)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_file(path: Path) -> None:
    path.write_bytes(b"x")


def as_nothing(path: Path) -> None:
    pass


PLACES = [
    f"{RUN}/.lock", f"{RUN}/final.partial", f"{RUN}/recipe.yaml.partial", f"{RUN}/loss.png",
    f"{RUN}/checkpoints", f"{RUN}/checkpoints/.partial", LAST, f"{RUN}/data", f"{RUN}/tokenizer",
    f"{RUN}/metrics.jsonl.partial", f"{RUN}/data/*", *FILES,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_kind_of_file(
    place: str, begun: Path, tmp_path: Path, repeat: Callable[[Path], int]
) -> None:
    kinds = [as_folder, as_pipe, as_loop, as_file, as_nothing]
    for number, make_it in enumerate(share(kinds, PLACES.index(place), 2)):
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        victim = find(out, place)
        if victim.is_dir():
            shutil.rmtree(victim)
        victim.unlink(missing_ok=True)
        victim.parent.mkdir(exist_ok=True)
        make_it(victim)
        repeat(out)


def test_final_partial_that_is_a_file_is_replaced(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    (out / RUN / "final.partial").write_text("x")
    (out / RUN / "loss.png").unlink()
    (out / RUN / "loss.png").mkdir()  # the plot cannot be drawn, and the run is published
    code = main(["train", str(begun.parent / "recipe.yaml"), "--out", str(out), "--quiet"])
    assert code == 0
    assert "no loss.png" in capsys.readouterr().err
    assert (out / "config.json").is_file() and not (out / RUN / "final.partial").exists()


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": n, "tokens": 64 * n, "loss": 2.0} for n in (1, 2)]
    bad = [b"null", b"7", b"{}", b'{"step": "x", "tokens": 3}', b'{"step": 1, "tokens": 1, "loss"',
           b'{"step": 3, "tokens": 4, "loss": null}', b"\xff\xfe", b"[" * 9999]  # fmt: skip
    lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode(), b'{"step": 9']
    path.write_bytes(b"\n".join(lines))
    assert metrics.read_metrics(path) == good


def test_damaged_shard_is_tokenized_again(
    begun: Path, tmp_path: Path, repeat: Callable[[Path], int]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    shard = next((out / RUN / "data").glob("*/meta.json")).parent
    content = (shard / "tokens.bin").read_bytes()
    (shard / "tokens.bin").write_bytes(content[:-2])
    assert not _whole(shard)
    assert repeat(out) == Reached.exit_code
    assert (shard / "tokens.bin").read_bytes() == content and _whole(shard)
