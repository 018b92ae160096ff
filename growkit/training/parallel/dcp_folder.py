"""A model's weights as a torch distributed checkpoint (DCP) and back, a tensor at a time.

DCP is what torch's own trainers read and write by parts: torchtitan's ``initial_load_path``, FSDP
scripts. Names are transformers', or those of torchtitan 0.3 for Llama 3 and Qwen3
(``models/llama3/state_dict_adapter.py``, ``models/qwen3``); its Llama rotates neighbouring entries
of a head where transformers rotates halves, so rows of q and k stand in another order there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growkit.checkpoint import (
    Checkpoint,
    OutputTensor,
    ShardWriter,
    copy_side_files,
    open_checkpoint,
    parse_size,
    plan_shards,
    staged_output,
)
from growkit.checkpoint.side_files import Overwrite
from growkit.core.errors import CheckpointError, UsageError
from growkit.core.names import CONFIG, MANIFEST
from growkit.core.progress import SILENT, Progress, Reporter
from growkit.core.writing import write_file
from growkit.optimizer_state.dcp_index import Planner, Reader, load, read_index
from growkit.optimizer_state.source import METADATA
from growkit.optimizer_state.torch_files import as_tensor, dtype_name
from growkit.training.models import copy_lineage

# Whether torchtitan's class rotates neighbouring entries of a head, and not its halves.
TITAN_TYPES = {"llama": True, "qwen3": False}
NAMES = ("transformers", "torchtitan")
_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Names:
    """Names and row orders of a checkpoint's tensors in a DCP folder."""

    def __init__(self, config: Mapping[str, Any], kind: str) -> None:
        self.titan = kind == "torchtitan"
        self.model_type = str(config.get("model_type"))
        if self.titan and self.model_type not in TITAN_TYPES:
            raise UsageError(
                f"torchtitan's names are known of {' and '.join(TITAN_TYPES)}, and this is a "
                f"{self.model_type}.",
                "Leave --names out: the tensors keep the names that transformers gives them.",
            )
        heads = int(config.get("num_attention_heads") or 1)
        self.heads = {"q": heads, "k": int(config.get("num_key_value_heads") or heads)}

    def __getitem__(self, name: str) -> str:
        if not self.titan:
            return name
        layer = _LAYER.fullmatch(name)
        if layer is not None and layer[2] in _IN_LAYER:
            return f"layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
        if name in _OUTER:
            return _OUTER[name]
        raise UsageError(
            f"torchtitan's {self.model_type} has no tensor like {name!r}.",
            "Leave --names out, or grow a model without it (biases, for example).",
        )

    def ordered(self, name: str, value: Tensor, *, back: bool = False) -> Tensor:
        """Rows of q and k of a Llama, from halves to neighbours or ``back``."""
        part = re.search(r"self_attn\.([qk])_proj", name)
        if not self.titan or not TITAN_TYPES[self.model_type] or part is None:
            return value
        heads = self.heads[part[1]]
        shape = (heads, -1, 2) if back else (heads, 2, value.shape[0] // heads // 2)
        return value.view(*shape, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


class _Streaming(DefaultSavePlanner):
    """Reads a tensor when its turn to be written has come."""

    def __init__(self, read: Mapping[str, Any], bar: Progress) -> None:
        super().__init__()
        self.read, self.bar = read, bar

    def transform_object(self, write_item: Any, object: Any) -> Any:
        value = self.read[write_item.index.fqn]()
        self.bar.advance(value.nbytes)
        return super().transform_object(write_item, value)


def export_dcp(
    source: Path,
    out: Path,
    *,
    names: str = "transformers",
    overwrite: Overwrite = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write the weights of a folder as a DCP folder, with config, tokenizer and lineage beside.

    Returns:
        ``out``, ``names``, ``tensors`` (their number) and ``bytes``.

    Raises:
        UsageError: names that the model does not have, or ``out`` cannot be used.
        CheckpointError: the source is damaged, or of a dtype that DCP is not asked to hold here.
    """
    with open_checkpoint(source) as checkpoint:
        named = _Names(checkpoint.config, names)
        stored = {named[name]: name for name in checkpoint.tensors}
        if named.titan and checkpoint.config.get("tie_word_embeddings"):
            stored.setdefault("lm_head.weight", "model.embed_tokens.weight")  # it has both
        for info in checkpoint.tensors.values():
            if info.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{info.name} has dtype {info.dtype}.",
                    f"DCP folders are written in {', '.join(_DTYPES)}: dequantise it first.",
                )

        def reader(name: str) -> Any:
            return lambda: named.ordered(name, as_tensor(checkpoint.read(name))).contiguous()

        shapes = {
            key: torch.empty((), dtype=_DTYPES[checkpoint.info(name).dtype]).expand(
                checkpoint.info(name).shape
            )
            for key, name in stored.items()
        }
        size = sum(value.nbytes for value in shapes.values())
        with staged_output(
            out, overwrite=overwrite, needed_bytes=size, sources=[source]
        ) as folder, reporter.progress("export", size) as bar:  # fmt: skip
            planner = _Streaming({key: reader(name) for key, name in stored.items()}, bar)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no process group is there
                dcp.save(
                    shapes, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True
                )
            _side_files(checkpoint, folder)
    return {"out": str(out), "names": names, "tensors": len(shapes), "bytes": size}


def _side_files(checkpoint: Checkpoint, folder: Path) -> None:
    copy_side_files(checkpoint.path, folder)
    write_file(folder / CONFIG, checkpoint.config_bytes)
    copy_lineage(checkpoint.path, folder)


def import_dcp(
    source: Path,
    out: Path,
    like: Path,
    *,
    overwrite: Overwrite = False,
    max_shard_size: int | str = "5GB",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write the weights in a DCP folder as an ordinary folder of the model ``like``.

    Optimizer state and whatever else the DCP folder holds is left there.

    Args:
        like: a checkpoint folder whose tensors, config and tokenizer the result has.

    Raises:
        CheckpointError: the DCP folder is damaged, or holds another model.
    """
    if not (source / METADATA).is_file():
        raise UsageError(
            f"{str(source)!r} holds no torch distributed checkpoint ({METADATA}).",
            "Give the folder that torch.distributed.checkpoint wrote, step-1000 of torchtitan say.",
        )
    index = read_index(source)
    with open_checkpoint(like) as checkpoint:
        named, prefix = _names_in(index.state_dict_metadata, checkpoint, source)
        outputs = {}
        for name, info in checkpoint.tensors.items():
            entry = index.state_dict_metadata[prefix + named[name]]
            if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != info.shape:
                found = list(getattr(entry, "size", ()))
                raise CheckpointError(
                    f"{name} is {found} in {str(source)!r}, {list(info.shape)} in {str(like)!r}.",
                    "Give the folder that the training started from with --like.",
                )
            dtype = dtype_name(entry.properties.dtype, name)
            outputs[name] = OutputTensor(name, dtype, info.shape)
        plan = plan_shards([*outputs.values()], parse_size(max_shard_size))
        size = plan.total_size
        with staged_output(
            out, overwrite=overwrite, needed_bytes=size, sources=[source, like]
        ) as folder, reporter.progress("import", size) as bar:  # fmt: skip
            with ShardWriter(folder, plan) as writer:
                for name, output in outputs.items():
                    key = prefix + named[name]
                    target = {key: torch.empty(output.shape, dtype=_DTYPES[output.dtype])}
                    load(target, Reader(source, index), Planner(), no_dist=True)
                    value = named.ordered(name, target[key], back=True).contiguous()
                    writer.write(name, 0, value.reshape(-1).view(torch.uint8).numpy())
                    bar.advance(value.nbytes)
            _side_files(checkpoint, folder)
    return {"out": str(out), "names": "torchtitan" if named.titan else "transformers",
            "tensors": len(outputs), "bytes": size}  # fmt: skip


def _names_in(keys: Mapping[str, Any], checkpoint: Checkpoint, source: Path) -> tuple[_Names, str]:
    """Which names a DCP folder has, and what stands before them."""
    config = checkpoint.config
    kinds = NAMES if config.get("model_type") in TITAN_TYPES else NAMES[:1]
    lacking: list[str] = []
    for kind in kinds:
        named = _Names(config, kind)
        for prefix in ("", "model."):
            missing = [name for name in checkpoint.tensors if prefix + named[name] not in keys]
            if not missing:
                return named, prefix
            lacking = lacking or missing
    raise CheckpointError(
        f"{str(source)!r} lacks {lacking[0]!r} of {str(checkpoint.path)!r}.",
        f"Give the folder that the training started from with --like; {MANIFEST} and names of "
        "tensors tell which it was.",
    )
