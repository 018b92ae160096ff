"""A distributed checkpoint's index may describe tensors and do nothing else."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from growkit.cli.main import main
from growkit.core.errors import CheckpointError
from growkit.optimizer_state.dcp_index import read_index
from growkit.optimizer_state.find import read_sharded
from growkit.training.parallel.sharded_optimizer import load_optimizer, save_optimizer

TORCH = "torch.distributed.checkpoint.metadata"
ALONE: Any = SimpleNamespace(group=None)


def make_optimizer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    group = {"param_names": ["weight", "bias"], "kind": "adamw", "note": "seen"}
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), **group}])
    for _ in range(2):
        model(torch.rand(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    """A run's checkpoint with sharded optimizer state, as torch writes it."""
    folder = tiny.make_folder(tmp_path / "checkpoint", tiny.llama_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_optimizer(make_optimizer(), folder, ALONE)
    return folder


# ---- hostile pickles, opcode by opcode --------------------------------------------------------


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def annotations(flag: str) -> bytes:
    """dataclass() compiles the annotations that BUILD's slot state gave to a class."""
    evil = f"a=open({flag!r},'w').write('ran'),*,b"
    code = b"\x80\x02" + named(TORCH, "MetadataIndex") + b"q\x000"
    code += named(TORCH, "field") + b")RN}" + text("init") + b"\x89s\x86bq\x010h\x00N}"
    code += text("__annotations__") + b"}" + text(evil) + text("int") + b"ss"
    code += text(evil) + b"h\x01s\x86b0" + named(TORCH, "dataclass") + b"h\x00\x85R."
    return code


def called(module: str, name: str, head: bytes = b"\x80\x02") -> Callable[[str], bytes]:
    return lambda flag: head + named(module, name) + text(f"echo ran > {flag}") + b"\x85R."


def stack_global(flag: str) -> bytes:
    return b"\x80\x04" + text("os") + text("system") + b"\x93" + text(f"echo > {flag}") + b"\x85R."


def dotted(flag: str) -> bytes:
    return b"\x80\x04" + text(TORCH) + text("os.system") + b"\x93" + text(f"> {flag}") + b"\x85R."


def nested(protocol: int) -> Callable[[str], bytes]:
    """os.system in a field of an otherwise honest index."""

    class Evil:
        def __init__(self, flag: str) -> None:
            self.flag = flag

        def __reduce__(self) -> Any:
            return os.system, (f"echo ran > {self.flag}",)

    return lambda flag: pickle.dumps(Metadata({}, {"a": Evil(flag)}, {}), protocol)


def of_class(name: str, state: bytes) -> Callable[[str], bytes]:
    return lambda flag: b"\x80\x02" + named(TORCH, name) + state + b"b."


def field(state: bytes) -> Callable[[str], bytes]:
    return lambda flag: b"\x80\x02" + named(TORCH, "StorageMeta") + b")\x81" + state + b"b."


def doubled_key(flag: str) -> bytes:
    """Hashing it would take 2**80 steps."""
    pairs = b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(80))
    return b"\x80\x02}" + text("a") + pairs + b"Ns."


def doubled_value(flag: str) -> bytes:
    pairs = b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(80))
    return b"\x80\x02" + text("a") + pairs + b"\x85R."


HOSTILE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "annotations": (annotations, "names .*field"),
    "reduce": (called("os", "system"), "names os.system"),
    "reduce in protocol 0": (called("os", "system", b""), "names os.system"),
    "reduce of posix": (called("posix", "system"), "names posix.system"),
    "builtins": (called("builtins", "exec"), "names builtins.exec"),
    "re-exported module": (called(TORCH, "os"), "names .*os"),
    "re-exported dataclass": (called(TORCH, "dataclass"), "names .*dataclass"),
    "torch.load": (called("torch", "load"), "names torch.load"),
    "dotted name": (dotted, "names .*os.system"),
    "stack global": (stack_global, "names os.system"),
    "nested in protocol 2": (nested(2), "names posix.system"),
    "nested in protocol 4": (nested(4), "names posix.system"),
    "nested in protocol 5": (nested(5), "names posix.system"),
    "state of a class": (of_class("MetadataIndex", b"}"), "changes MetadataIndex"),
    "slot state of a class": (of_class("StorageMeta", b"N}\x86"), "changes StorageMeta"),
    "state of a function": (lambda _: b"\x80\x02ctorch\nSize\n}b.", "changes _size"),
    "slot state of an instance": (field(b"N}" + text("modules") + b"]s\x86"), "not its fields"),
    "undeclared field": (field(b"}" + text("__class__") + b"Ns"), "__class__"),
    "call of an instance's class": (lambda _: b"\x80\x02ctorch\nSize\n)\x81.", "makes _size"),
    "instance with arguments": (
        lambda _: b"\x80\x02" + named(TORCH, "StorageMeta") + text("x") + b"\x85R.",
        "calls StorageMeta",
    ),
    "persistent id": (lambda _: b"\x80\x02" + text("x") + b"Q.", "unusual opcode"),
    "extension": (lambda _: b"\x80\x02\x82\x01.", "unusual opcode"),
    "old instance": (lambda _: b"(" + text("true") + b"ios\nsystem\n.", "unusual opcode"),
    "keys without end": (doubled_key, "tuple is a key"),
    "value without end": (doubled_value, "calls"),
    "truncated": (lambda _: b"\x80\x04\x95\xff\xff", "cannot be read"),
    "nothing": (lambda _: b"", "EOFError"),
    "no index": (lambda _: pickle.dumps({}, 4), "it is no index"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_is_refused_by_both_readers(case: str, honest: Path, tmp_path: Path) -> None:
    make, said = HOSTILE[case]
    flag = tmp_path / "flag"
    (honest / "optimizer_0" / ".metadata").write_bytes(make(str(flag)))
    before = vars(MetadataIndex).copy()
    with pytest.raises(CheckpointError, match=said):
        read_sharded(honest / "optimizer_0")
    with pytest.raises(CheckpointError, match=said):
        load_optimizer(make_optimizer(), honest, ALONE)
    assert not flag.exists() and vars(MetadataIndex) == before


def test_the_cases_would_run_code_elsewhere(tmp_path: Path) -> None:
    """Negative control: torch's own reader runs three of them."""
    for case in ("reduce", "stack global", "nested in protocol 4"):
        flag = tmp_path / "flag"
        (tmp_path / ".metadata").write_bytes(HOSTILE[case][0](str(flag)))
        with pytest.raises(AttributeError) if "nested" not in case else warnings.catch_warnings():
            dcp.FileSystemReader(tmp_path).read_metadata()
        assert flag.exists()
        flag.unlink()


def test_growing_refuses_it_and_writes_nothing(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    (honest / "optimizer_0" / ".metadata").write_bytes(annotations(str(flag)))
    arguments = ["grow", str(honest), "--layers", "+1", "--no-verify", "--out"]
    assert main([*arguments, str(tmp_path / "grown")]) == 1
    assert "which no index of tensors needs" in capsys.readouterr().err
    assert not flag.exists() and not (tmp_path / "grown").exists()


class Value:
    """A single value beside the tensors; torch's planner unpickles it without restriction."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return Path.touch, (self.flag,)


def test_single_values_are_plain_data(honest: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    optimizer = make_optimizer()
    optimizer.param_groups[0]["note"] = Value(flag)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_optimizer(optimizer, honest, ALONE)
    optimizer.param_groups[0]["note"] = ""
    with pytest.raises(CheckpointError, match=r"weights.only|WeightsUnpickler"):
        load_optimizer(optimizer, honest, ALONE)
    assert not flag.exists()


def test_honest_files_load_as_before(honest: Path) -> None:
    wanted, found = make_optimizer(), make_optimizer(seed=1)
    load_optimizer(found, honest, ALONE)
    assert found.param_groups[0]["note"] == "seen"
    for a, b in zip(*(o.param_groups[0]["params"] for o in (wanted, found)), strict=True):
        assert all(
            torch.equal(value, found.state[b][key]) for key, value in wanted.state[a].items()
        )
    file = honest / "optimizer_0" / ".metadata"
    ours, theirs = read_index(honest / "optimizer_0"), pickle.loads(file.read_bytes())
    for name in ("state_dict_metadata", "planner_data", "storage_data"):
        assert getattr(ours, name) == getattr(theirs, name) and getattr(ours, name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_index_of_any_protocol_and_of_other_versions(honest: Path, protocol: int) -> None:
    """Older torch had fewer fields; newer Pythons name paths otherwise (the next test)."""
    file = honest / "optimizer_0" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    wanted = metadata.storage_data
    del metadata.version, metadata.storage_meta
    file.write_bytes(pickle.dumps(metadata, protocol))
    assert read_index(honest / "optimizer_0").storage_data == wanted


def test_only_folders_of_optimizers_are_searched(honest: Path) -> None:
    """A hostile folder with another name is not even opened."""
    from growkit.optimizer_state.find import find_state

    other = honest / "weights"
    shutil.copytree(honest / "optimizer_0", other)
    (other / ".metadata").write_bytes(b"hostile")
    state = find_state(honest)
    assert state is not None and state.path == honest / "optimizer_0"
    shutil.rmtree(honest / "optimizer_0")
    assert find_state(honest) is None
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_state(honest, other)


def test_paths_by_the_names_of_newer_pythons(honest: Path) -> None:
    file = honest / "optimizer_0" / ".metadata"
    content = file.read_bytes()
    long = content.replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local")
    assert long != content
    # One frame holds the whole pickle; its length grew by seven.
    frame = struct.unpack("<Q", long[3:11])[0] + 7
    file.write_bytes(long[:3] + struct.pack("<Q", frame) + long[11:])
    assert read_index(honest / "optimizer_0").storage_data


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", ".hidden", "a/b", "x\x1b[2J"])
def test_places_outside_the_folder_are_refused(honest: Path, place: str) -> None:
    file = honest / "optimizer_0" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = place
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="no file of the folder"):
        read_sharded(honest / "optimizer_0")


def test_pipes_are_refused_and_never_waited_for(honest: Path) -> None:
    folder = honest / "optimizer_0"
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="not a regular file"):
            load_optimizer(make_optimizer(), honest, ALONE)
    shutil.rmtree(folder)
    os.mkfifo(honest / "optimizer.pt")
    assert main(["grow", str(honest), "--layers", "+1", "--out", str(honest) + "-g"]) == 1
