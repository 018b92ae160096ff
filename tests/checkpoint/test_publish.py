"""The final name never holds a part of a checkpoint, and nothing that exists is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from growkit.checkpoint import OutputTensor, ShardWriter, plan_shards, staged_output, staging
from growkit.core.errors import GrowkitError, UsageError

Usage = namedtuple("Usage", "total used free")


def publish(out: Path, content: str = "new", *, overwrite: bool = False, **options: Any) -> None:
    settings: dict[str, Any] = {"needed_bytes": 1000, "sources": []} | options
    with staged_output(out, overwrite=overwrite, **settings) as folder:
        (folder / "config.json").write_text(content)
        (folder / "growkit_optimizer").mkdir()
        (folder / "growkit_optimizer" / "state.json").write_text(content)
        plan = plan_shards([OutputTensor(name, "U8", (4,)) for name in "ab"], 4)
        with ShardWriter(folder, plan) as writer:
            writer.write("a", 0, content[:3].encode())


def read(out: Path) -> str | None:
    """Content of a whole folder, None where there is none; fails on anything in between."""
    if not out.exists():
        return None
    names = {path.name for path in out.iterdir()} - {staging.MARKER}
    assert len(names) == 5
    content = (out / "config.json").read_text()
    assert (out / "growkit_optimizer" / "state.json").read_text() == content
    assert (
        (out / "model-00001-of-00002.safetensors").read_bytes().endswith(content.encode() + b"\0")
    )
    return content


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)


def test_publishes_a_new_folder_and_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    publish(out)
    assert read(out) == "new"
    assert siblings(out) == []
    assert not (out / staging.MARKER).exists()


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    assert read(tmp_path / "out") == "new"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path: Path, request: pytest.FixtureRequest, exchange: bool) -> None:
    if not exchange:
        request.getfixturevalue("no_exchange")
    out = tmp_path / "out"
    publish(out, "old")
    (out / "pytorch_model.bin").write_text("of the old one")
    publish(out, "new", overwrite=True)
    assert read(out) == "new"
    assert siblings(out) == []
    assert not (out / staging.MARKER).exists()


def test_link_to_a_folder_is_replaced_behind_the_link(tmp_path: Path) -> None:
    publish(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == "new"


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    with pytest.raises(UsageError, match=r"exists and is not empty.*--overwrite"):
        publish(out)
    assert read(out) == "old"
    assert siblings(out) == []


def test_only_a_checkpoint_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="does not look like a checkpoint"):
        publish(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        publish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "x"


def test_output_is_a_mount_point() -> None:
    with pytest.raises(UsageError, match="mount point"):
        publish(Path("/"), overwrite=True)


@pytest.mark.parametrize(
    "out", ["source", "source/inside", ".", "link", "source.partial/../source", "link/inside"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_and_source_overlap(tmp_path: Path, out: str, overwrite: bool) -> None:
    source = tmp_path / "base" / "source"
    publish(source, "old")
    (source.parent / "source.partial").mkdir()
    (source.parent / "link").symlink_to(source)
    with pytest.raises(UsageError, match="source") as caught:
        publish(source.parent / out, overwrite=overwrite, sources=[source])
    assert "beside the source" in caught.value.remedy
    assert read(source) == "old"


def test_the_partial_folder_is_the_source(tmp_path: Path) -> None:
    publish(tmp_path / "x.partial", "old")
    with pytest.raises(UsageError, match="is the source"):
        publish(tmp_path / "x", sources=[tmp_path / "x.partial"])
    assert read(tmp_path / "x.partial") == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_exception_leaves_the_old_state(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    out = tmp_path / "parent" / "out"
    if exists:
        publish(out, "old")
    with (
        pytest.raises(error),
        staged_output(out, overwrite=True, needed_bytes=0, sources=[]) as folder,
    ):
        (folder / "half").write_text("x")
        raise error
    assert read(out) == ("old" if exists else None)
    assert out.parent.exists() == exists
    assert not out.with_name("out.partial").exists()


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 1_500_000_000))
    publish(tmp_path / "fits", needed_bytes=1_500_000_000)
    entered = False
    out = tmp_path / "a" / "b"
    with (
        pytest.raises(GrowkitError, match=r"needs 1\.51 GB.*1\.50 GB free") as caught,
        staged_output(out, overwrite=False, needed_bytes=1_510_000_000, sources=[]),
    ):
        entered = True
    assert caught.value.exit_code == 1
    assert not entered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits"]


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    publish(out, "old")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(GrowkitError, match="disk became full"):
        publish(out, overwrite=True)
    monkeypatch.undo()
    assert read(out) == "old"
    assert siblings(out) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(GrowkitError, match="cannot be written into") as caught:
            publish(out)
        assert os.strerror(code) in caught.value.cause
    assert list(tmp_path.iterdir()) == []


def test_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(GrowkitError, match=r"cannot be written into.*Permission denied"):
        publish(tmp_path / "out")


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GrowkitError, match="cannot be written into"):
        publish(tmp_path / "file" / "out")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_partial_folder_of_somebody_else_is_kept(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / "out.partial"
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "precious").write_text("x")
    if kind == "folder":
        (tmp_path / "thing").rename(partial)
    elif kind == "file":
        partial.write_text("precious")
    else:
        partial.symlink_to(tmp_path / "thing")
    with pytest.raises(UsageError, match="not made by growkit"):
        publish(tmp_path / "out")
    assert partial.is_file() or (partial / "precious").exists()
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_destroy_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_output(out, overwrite=False, needed_bytes=0, sources=[]) as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(GrowkitError, match="Another run is writing"):
            publish(out)
        assert (folder / "config.json").read_text() == "first"
    assert (out / "config.json").read_text() == "first"


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(UsageError, match="--overwrite"),
        staged_output(out, overwrite=False, needed_bytes=0, sources=[]),
    ):
        out.mkdir()
        (out / "precious").write_text("x")
    assert (out / "precious").exists()
    assert siblings(out) == []


def test_failed_second_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_exchange: None
) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        publish(out, overwrite=True)
    assert read(out) == "old"
    assert siblings(out) == []


def test_everything_is_durable_before_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append("RENAME")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    publish(tmp_path / "out")
    before = events[: events.index("RENAME")]
    files = {path.name for path in (tmp_path / "out").rglob("*")} | {"out.partial"}
    assert files <= set(before)
    assert tmp_path.name in events[events.index("RENAME") :]


def run_and_kill(step: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a child that kills itself before its ``step``-th system call.

    Returns:
        True when the child was killed, False when it finished before.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0
        return False
    try:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def call(*arguments: Any) -> Any:
                tick()
                return real(*arguments)

            setattr(os, name, call)

        # Calls that change files report themselves to the audit hook, these do not.
        for name in ("pwrite", "fsync"):
            wrap(name)
        watched = ("os.", "shutil.", "open", "ctypes.dlsym")
        sys.addaudithook(lambda event, _: tick() if event.startswith(watched) else None)
        action()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_kill_at_any_moment(
    tmp_path: Path, request: pytest.FixtureRequest, exchange: bool, exists: bool
) -> None:
    if not exchange:
        request.getfixturevalue("no_exchange")
    elif not staging._exchange(_folder(tmp_path / "x"), _folder(tmp_path / "y")):
        pytest.skip("no renameat2 here")
    seen: set[str | None] = set()
    step = 0
    while True:
        step += 1
        out = tmp_path / f"case{step}" / "out"
        out.parent.mkdir()
        if exists:
            publish(out, "old")
        killed = run_and_kill(step, lambda out=out: publish(out, "new", overwrite=True))
        state = read(out)
        seen.add(state)
        assert state in (("old", "new") if exists and exchange else ("old", "new", None))
        assert all(name.startswith(("out.partial", "out.old-")) for name in siblings(out))
        # A run that fails right away already brings back what was there before.
        with (
            pytest.raises(ZeroDivisionError),
            staged_output(out, overwrite=True, needed_bytes=0, sources=[]),
        ):
            raise ZeroDivisionError
        assert read(out) == (state or ("old" if exists else None))
        assert siblings(out) == []
        publish(out, "end", overwrite=True)
        assert read(out) == "end"
        assert siblings(out) == []
        if not killed:
            break
    assert step > 30
    assert {"new", "old" if exists else None} <= seen


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
