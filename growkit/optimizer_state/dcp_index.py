"""The index (``.metadata``) of a torch.distributed.checkpoint folder, read without running code.

The index is a pickle, and torch unpickles it (and single values beside it) without restriction; a
checkpoint may have been downloaded. Here the pickle may do nothing but describe tensors:

* the opcodes of plain values, of naming a class, of making an instance and of filling it;
* the names in :data:`_NAMES`, one by one: torch's modules re-export ``dataclass`` and ``os``;
* BUILD fills an instance of one of these dataclasses with its declared fields, never a class;
* keys of dicts are text, numbers or a tensor's index: hashing (or showing) a tuple of the same
  tuple twice, sixty deep, never ends.

What comes out is checked field by field. :class:`Reader` and :class:`Planner` make torch's loader
use it, so that torch itself never unpickles the file, not even one exchanged meanwhile.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from growkit.core.errors import CheckpointError
from growkit.core.files import read_bytes, require_regular
from growkit.optimizer_state.source import METADATA, RESET

# 100 000 tensors in 100 pieces each take about 500 bytes a piece; larger ones are no optimizer's.
_MAX_BYTES = 256_000_000
_DATACLASSES = (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta,
    TensorProperties, TensorStorageMetadata, _StorageInfo,
)  # fmt: skip
# Fields that one version of torch writes and another does not know.
_KNOWN_FIELDS = {Metadata: {"version"}, _StorageInfo: {"transform_descriptors"}}
_FIELDS = {
    kind: {field.name for field in dataclasses.fields(kind)} | _KNOWN_FIELDS.get(kind, set())
    for kind in _DATACLASSES
}


def _size(*arguments: Any) -> torch.Size:
    sizes = arguments[0] if len(arguments) == 1 else None
    if not isinstance(sizes, tuple | list) or not all(type(n) is int and n >= 0 for n in sizes):
        raise pickle.UnpicklingError("it has a size that is no list of numbers")
    return torch.Size(sizes)


def _layout(name: str = "") -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None) if type(name) is str else None
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError("it names an unknown layout")
    return layout


def _memory_format(value: int = -1) -> _MEM_FORMAT_ENCODING:
    return _MEM_FORMAT_ENCODING(value)


def _path(*parts: str) -> str:
    """Where the folder was when it was written; nothing reads it."""
    return "/".join(part for part in parts if type(part) is str)


def _ordered(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise pickle.UnpicklingError("it fills a dict in an unusual way")
    return {}


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_CALLABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _memory_format,
    ("collections", "OrderedDict"): _ordered,
    **{(module, name): _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
}
_NAMES: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in _DATACLASSES},
    **_CALLABLE,
}
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.LONG4, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.DICT,
    pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE,
    pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


def _kind(thing: Any) -> str:
    """A class or function by its name, a value by its class."""
    named = thing if isinstance(thing, type) or callable(thing) else type(thing)
    return getattr(named, "__qualname__", type(named).__name__)


_STANDARD: dict[int, Any] = dict(pickle._Unpickler.dispatch)


class _IndexUnpickler(pickle._Unpickler):
    """The unpickler that the standard library has in Python, with the opcodes that an index needs.

    The one in C has no place where BUILD could be refused, and allocates what a file asks for.
    """

    dispatch: ClassVar[Any] = {code[0]: _STANDARD[code[0]] for code in _OPCODES}
    stack: list[Any]

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:  # an opcode without an entry, or a memo that was never put
            raise pickle.UnpicklingError(f"it has the unusual opcode or memo {error}") from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple or not any(function is c for c in _CALLABLE.values()):
            raise pickle.UnpicklingError(
                f"it calls {_kind(function)}, which no index of tensors needs"
            )
        self.stack[-1] = function(*arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        if arguments == () and any(kind is known for known in _DATACLASSES):
            self.stack[-1] = object.__new__(kind)
        elif kind is _ordered and arguments == ():
            self.stack[-1] = {}
        else:
            raise pickle.UnpicklingError(f"it makes {_kind(kind)}, which no index of tensors needs")

    def _build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if type(instance) not in _FIELDS:
            raise pickle.UnpicklingError(f"it changes {_kind(instance)}, which is no description")
        if type(instance) is TensorProperties:
            kinds = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)
            if type(state) is not tuple or tuple(map(type, state)) != kinds:
                raise pickle.UnpicklingError("it describes a tensor in an unknown way")
            instance.__setstate__(state)
            return
        name = type(instance).__name__
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"it gives {name} a state that is not its fields")
        for field in state.keys() - _FIELDS[type(instance)]:
            raise pickle.UnpicklingError(f"it gives {name} the field {field!r}, which it has not")
        instance.__dict__.update(state)

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if type(key) not in (str, int, MetadataIndex):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key of a dict in it")
            if type(key) is MetadataIndex:
                _check_index(key)

    def _set_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _STANDARD[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        self._check_keys(self.stack[::2])
        _STANDARD[pickle.SETITEMS[0]](self)

    def _dict(self) -> None:
        self._check_keys(self.stack[::2])
        _STANDARD[pickle.DICT[0]](self)

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
    }


def read_index(folder: Path) -> Metadata:
    """The index of a folder.

    Raises:
        CheckpointError: damaged, or it would do something else than describe tensors.
    """
    content = read_bytes(folder / METADATA, limit=_MAX_BYTES, remedy=RESET)
    try:
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        _check(metadata)
    except Exception as error:  # damaged pickles fail in many ways
        said = str(error) or type(error).__name__
        raise CheckpointError(
            f"{METADATA} in {str(folder)!r} cannot be read: {said[:300]}.", RESET
        ) from error
    return metadata


def _check(metadata: Any) -> None:
    """Every field that is read later is of its kind; raises ValueError or AttributeError."""
    _require(type(metadata) is Metadata, "it is no index")
    entries, paths = metadata.state_dict_metadata, metadata.planner_data
    places = metadata.storage_data
    _require(type(entries) is dict, "it lists no tensors")
    for key, entry in entries.items():
        _require(type(key) is str, "a name is no text")
        if type(entry) is TensorStorageMetadata:
            _require(type(entry.properties) is TensorProperties, f"{key!r} has no properties")
            _require(type(entry.size) is torch.Size, f"{key!r} has no size")
            _require(type(entry.properties.__dict__["dtype"]) is torch.dtype, f"{key!r}: no dtype")
            _require(type(entry.chunks) is list, f"{key!r} has no pieces")
            for chunk in entry.chunks:
                sizes = (chunk.offsets, chunk.sizes) if type(chunk) is ChunkStorageMetadata else ()
                _require(
                    len(sizes) == 2
                    and all(type(s) is torch.Size and len(s) == len(entry.size) for s in sizes)
                    and all(
                        first + count <= whole
                        for first, count, whole in zip(*sizes, entry.size, strict=True)
                    ),
                    f"{key!r} has a piece outside of itself",
                )
        else:
            _require(type(entry) is BytesStorageMetadata, f"{key!r} is of an unknown kind")
    _require(paths is None or type(paths) is dict, "its paths are no table")
    for key, path in (paths or {}).items():
        plain = type(path) is tuple and all(type(part) in (str, int) for part in path)
        _require(type(key) is str and plain, f"the path of {key!r} is no path")
    _require(type(places) is dict, "it does not say where tensors are")
    for index, place in places.items():
        _require(
            type(index) is MetadataIndex and type(place) is _StorageInfo, "a place is no place"
        )
        _check_index(index)
        name, numbers = place.relative_path, (place.offset, place.length)
        _require(type(name) is str, f"{index.fqn!r} is in no file")
        plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")
        _require(plain, f"{index.fqn!r} is in {name!r}, which is no file of the folder")
        _require(all(type(n) is int and n >= 0 for n in numbers), f"{index.fqn!r} has no place")
        transforms = getattr(place, "transform_descriptors", None) or []
        known = type(transforms) in (list, tuple) and all(type(t) is str for t in transforms)
        _require(known, f"{index.fqn!r} is stored in an unknown way")
    metadata.storage_meta, metadata.version = StorageMeta(), None  # not read, not checked


def _check_index(index: MetadataIndex) -> None:
    _require(type(index.__dict__.get("fqn")) is str, "an index has no name")
    _require(type(index.__dict__.get("offset")) in (torch.Size, type(None)), "no offset")
    _require(type(index.__dict__.get("index")) in (int, type(None)), "no number")


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


class Reader(FileSystemReader):
    """torch's reader of a folder, with an index that :func:`read_index` has read."""

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self.metadata = read_index(folder) if metadata is None else metadata
        self.folder = folder

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Read what the plan asks for, of regular files."""
        for name in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            require_regular(self.folder / name, remedy=RESET)
        return super().read_data(plan, planner)


def load(target: dict[str, Any], reader: Reader, planner: Planner, **where: Any) -> None:
    """torch's ``load`` (arguments ``process_group``, ``no_dist``) with errors of one sentence.

    Raises:
        CheckpointError: files are missing, torn, or not of this index.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there
            dcp.load(target, storage_reader=reader, planner=planner, **where)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{', '.join(sorted(target))} in {str(reader.folder)!r} cannot be read: {reason}.",
            RESET,
        ) from error


class Planner(DefaultLoadPlanner):
    """torch's planner, which loads single values (options of parameter groups) as plain data."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        # Passed on as a file of a kind that torch's own method reads: it places the value.
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
