"""The Python interface: ``from growkit import grow, plan, convert, verify``.

Importing it imports no torch; ``verify`` does when it is called, and ``grow`` and ``convert`` do
unless told not to verify. Paths may be strings, and sizes numbers: ``layers=36`` is ``"36"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.core.errors import UsageError
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest

if TYPE_CHECKING:
    from growkit.optimizer_state.load import Loaded
    from growkit.verification import VerificationReport

Folder = str | PathLike[str]


@dataclass(frozen=True)
class Written:
    """A checkpoint that was grown or converted.

    Attributes:
        folder: where it is.
        plan: what every tensor is made of.
        manifest: the content of its ``growkit.json``: request, new parameters, verification.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]


def plan(source: Folder, request: GrowthRequest | None = None, **sizes: Any) -> Plan:
    """What a growth would do, from headers and config alone; nothing is written.

    Args:
        source: folder of the checkpoint; one with a ``config.json`` and no weights will do.
        request: sizes and choices, or give them as keywords: ``plan("ckpt", layers="+4")``.

    Raises:
        UsageError: the model cannot grow that way; the message has the sizes that it can.
    """
    from growkit.checkpoint import open_checkpoint
    from growkit.surgery.plan import declare_tensors, plan_growth

    asked = _request(request, sizes)
    with open_checkpoint(Path(source), require_tensors=False) as checkpoint:
        if not checkpoint.tensors:
            declare_tensors(checkpoint)
        return plan_growth(checkpoint, asked)


def grow(
    source: Folder,
    out: Folder,
    request: GrowthRequest | None = None,
    *,
    writing: dict[str, Any] | None = None,
    **sizes: Any,
) -> Written:
    """Grow a checkpoint folder into ``out`` and verify on the written files that nothing changed.

    Args:
        source: folder of the checkpoint.
        out: folder to write; it appears only when it is whole and verified.
        request: sizes and choices, or give them as keywords:
            ``grow("ckpt", "grown", signal_heads="x2", layers=36)``.
        writing: options of :func:`growkit.growing.grow_checkpoint` (``overwrite``, ``verify``,
            ``text``, ``max_shard_size``, ``threads``, ``optimizer_from`` ...).

    Raises:
        UsageError, CheckpointError, GrowkitError: bad request, source or target; nothing written.
        VerificationFailed: the written folder does not compute what its plan promises.
    """
    from growkit.growing import grow_checkpoint

    made, manifest = grow_checkpoint(
        Path(source), Path(out), _request(request, sizes), **(writing or {})
    )
    return Written(Path(out), made, manifest)


def convert(
    source: Folder, out: Folder, to: str, *, writing: dict[str, Any] | None = None, **choices: Any
) -> Written:
    """Write a checkpoint in another attention variant.

    Args:
        source: as in :func:`grow`.
        out: as in :func:`grow`.
        writing: as in :func:`grow`.
        to: the attention to write, as ``growkit convert --to``.
        choices: fields of :class:`growkit.variants.request.ConversionRequest`.

    Raises:
        UsageError, CheckpointError, GrowkitError, VerificationFailed: as :func:`grow`.
    """
    from growkit.converting import convert_checkpoint
    from growkit.variants.request import ConversionRequest

    request = ConversionRequest.from_mapping({"to": to, **choices})
    made, manifest = convert_checkpoint(Path(source), Path(out), request, **(writing or {}))
    return Written(Path(out), made, manifest)


def verify(a: Folder, b: Folder, **choices: Any) -> VerificationReport:
    """Compare two written folders, loaded through transformers alone, on real text.

    Args:
        a: the folder that is taken to be right.
        b: the folder that must compute the same.
        choices: options of :func:`growkit.verification.verify_checkpoints`.

    Returns:
        The report; ``report.passed`` says whether they agree. A difference is no exception.
    """
    from growkit.verification import verify_checkpoints

    return verify_checkpoints(Path(a), Path(b), **choices)


def load_grown_optimizer(optimizer: Any, model: Any, folder: Folder) -> Loaded:
    """Give the optimizer state that grew with a checkpoint to an optimizer of one's own.

    Args:
        optimizer: a torch optimizer over parameters of ``model``, before its first step.
        model: loaded from ``folder``.
        folder: the grown checkpoint.

    Raises:
        UsageError: no optimizer state was grown with the checkpoint.
        CheckpointError: a moment has another shape than its parameter.
    """
    from growkit.optimizer_state.load import load_into
    from growkit.optimizer_state.store import FOLDER, INDEX, read_store

    stored = Path(folder) / FOLDER
    if not (stored / INDEX).is_file():
        raise UsageError(
            f"{str(folder)!r} holds no grown optimizer state.",
            "Grow from the folder of a run, or give optimizer_from; a fresh optimizer needs none.",
        )
    return load_into(optimizer, model, read_store(stored))


def _request(request: GrowthRequest | None, sizes: dict[str, Any]) -> GrowthRequest:
    if request is not None and sizes:
        raise UsageError(
            f"A request and the keywords {', '.join(sizes)} were both given.", "Give one of them."
        )
    return request if request is not None else GrowthRequest.from_mapping(sizes)
