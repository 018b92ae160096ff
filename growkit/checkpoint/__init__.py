"""Checkpoint folders: header reader, streaming writer, atomic publish. No torch."""

from growkit.checkpoint.dtypes import DTYPES, DType
from growkit.checkpoint.folder import Checkpoint, open_checkpoint
from growkit.checkpoint.header import FileHeader, TensorInfo, read_header
from growkit.checkpoint.identity import content_hash, identity
from growkit.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from growkit.checkpoint.publish import staged_output
from growkit.checkpoint.quantised import check_copies_only, check_unquantised
from growkit.checkpoint.shards import (
    OutputTensor,
    Place,
    PlannedShard,
    ShardPlan,
    parse_size,
    plan_shards,
)
from growkit.checkpoint.side_files import copy_side_files
from growkit.checkpoint.writer import ShardWriter

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "DType",
    "FileHeader",
    "OutputTensor",
    "Place",
    "PlannedShard",
    "ShardPlan",
    "ShardWriter",
    "TensorInfo",
    "check_copies_only",
    "check_unquantised",
    "content_hash",
    "copy_side_files",
    "identity",
    "open_checkpoint",
    "parse_size",
    "plan_shards",
    "read_header",
    "staged_output",
]
