"""The main job in one call: plan, write, verify the written files, publish."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint import (
    ShardPlan,
    ShardWriter,
    content_hash,
    copy_side_files,
    open_checkpoint,
    parse_size,
    plan_shards,
    staged_output,
)
from growkit.checkpoint.side_files import Overwrite, side_file_names
from growkit.checkpoint.unchanged import Unchanged
from growkit.core.errors import UsageError
from growkit.core.files import output_path
from growkit.core.names import CONFIG, README
from growkit.core.progress import SILENT, Reporter
from growkit.core.worker import Worker
from growkit.core.writing import write_file
from growkit.finished import finished_output
from growkit.model_code.exported import MODEL_TYPES, export_code
from growkit.record.card import model_card
from growkit.record.manifest import MANIFEST, build_manifest, config_block, manifest_text
from growkit.surgery.execute import execute
from growkit.surgery.lambdas import check_lambdas, layer_lambdas
from growkit.surgery.plan import Plan, plan_growth
from growkit.surgery.request import GrowthRequest
from growkit.surgery.source_checks import check_tied_head
from growkit.vocabulary.tokenizer_files import TOKENIZER_FILES
from growkit.vocabulary.tokenizer_size import may_have_more_than, tokens_of

if TYPE_CHECKING:
    from growkit.optimizer_state.write import GrownState

# Config, card and model code beside the tensors; for the check of disk space.
SIDE_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class WriteOptions:
    """How a folder is written, whatever is written into it.

    Attributes:
        overwrite: replace an existing folder; ``"all"``: with foreign files in it.
        verify: compare source and result through transformers (imports torch).
        text: to verify on; default the built-in sample.
        hash_content: record a hash of the source's weights (reads them once more).
        max_shard_size: bytes, or with a unit (``5GB``).
        threads: workers; default two a core that this process may use.
    """

    overwrite: Overwrite = False
    verify: bool = True
    text: str | None = None
    hash_content: bool = False
    max_shard_size: int | str = "5GB"
    threads: int | None = None


def grow_checkpoint(
    source: Path,
    out: Path,
    request: GrowthRequest,
    *,
    optimizer_from: Path | None = None,
    reporter: Reporter = SILENT,
    **writing: Any,
) -> tuple[Plan, dict[str, Any]]:
    """Grow a checkpoint folder into ``out``.

    The result appears under ``out`` only when it is whole and, unless ``verify`` is False, was
    verified: a failed verification, an error or Ctrl-C leaves nothing new, and an old ``out`` as
    it was.

    Args:
        source: folder of the checkpoint.
        out: folder to write.
        request: sizes and choices.
        optimizer_from: folder of the run's optimizer state, when it is not beside the weights;
            ``request.optimizer_state`` says what becomes of it.
        reporter: shows progress, and is told about weights that are not finite.
        writing: fields of :class:`WriteOptions`.

    Returns:
        The plan and the manifest (content of ``growkit.json``); with ``already_there`` when the
        same growth had written ``out`` before, whole, and nothing was left to do.

    Raises:
        UsageError, CheckpointError, GrowkitError: bad request, source or target; nothing written.
        VerificationFailed: the written folder does not compute what its plan promises.
    """
    options = WriteOptions(**writing)
    parse_size(options.max_shard_size)
    with verifier(options) as worker, open_checkpoint(source) as checkpoint:
        plan = plan_growth(checkpoint, request)
        layers = plan.source_sizes["layer"]
        lambdas = layer_lambdas(checkpoint, plan.source_family, layers)
        check_lambdas(plan.source_family, lambdas)
        check_tied_head(checkpoint, plan.source_family, plan.source_sizes)
        optimizer = _grown_optimizer(plan, request, optimizer_from)
        manifest = publish_plan(
            plan,
            out,
            request.recorded(),
            options,
            worker,
            reporter=reporter,
            optimizer=optimizer,
        )
    return plan, manifest


def verifier(options: WriteOptions) -> Worker:
    """What verification needs is imported while the folder is planned and written."""
    return Worker("transformers.modeling_utils", "growkit.verification", wanted=options.verify)


def publish_plan(
    plan: Plan,
    out: Path,
    request: dict[str, Any],
    options: WriteOptions,
    worker: Worker | None = None,
    *,
    reporter: Reporter = SILENT,
    optimizer: GrownState | None = None,
    side_files: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write a plan, verify the files and publish the folder; returns the manifest.

    Errors are those of :func:`grow_checkpoint`; ``request`` goes into the manifest, ``worker`` is
    the :func:`verifier`, ``optimizer`` the grown optimizer state to write beside the weights,
    ``side_files`` are further files (name -> content).
    """
    shard_bytes = parse_size(options.max_shard_size)
    content = None
    if options.hash_content:
        with reporter.progress("hash", plan.checkpoint.total_size) as bar:
            content = content_hash(plan.checkpoint, bar)
    manifest = build_manifest(plan, request, content)
    names = side_file_names(
        plan.checkpoint.path, model_code=_brings_model_code(plan), leave_out=_replaced(plan)
    )
    side_files = {**plan.growth.files, **(side_files or {})}
    manifest["copied_files"] = names
    state_files = Unchanged()
    needed = plan.total_bytes + _side_file_bytes(plan, manifest)
    needed += sum(map(len, side_files.values()))
    if optimizer is not None:
        manifest["optimizer_state"] = optimizer.describe() | {"summary": optimizer.summary()}
        needed += optimizer.total_bytes
        state_files.add(optimizer.state.stored_files())
        for warning in optimizer.warnings():
            reporter.warn(warning)
    shard_plan = plan_shards([tensor.output for tensor in plan.tensors], shard_bytes)
    if not options.overwrite:
        found = finished_output(
            plan,
            output_path(out),
            manifest,
            shard_plan,
            verify=options.verify,
            optimizer=optimizer,
            side_files=side_files,
            threads=options.threads,
        )
        if found is not None:
            return found | {"already_there": True}
    source = plan.checkpoint.path
    _warn_of_missing_rows(plan, reporter)
    with staged_output(
        out, overwrite=options.overwrite, needed_bytes=needed, sources=[source]
    ) as folder:
        _write_tensors(plan, folder, shard_plan, options.threads, reporter)
        if optimizer is not None:
            _write_optimizer(optimizer, folder, options.threads, reporter)
        _write_side_files(plan, folder, manifest, out.name)
        for file, data in side_files.items():
            write_file(folder / file, data)
        if options.verify:
            with reporter.progress("verify", 100, unit="%") as bar:
                compared = {"a": source, "b": folder, "name": out.name, "text": options.text}
                here = worker or Worker(wanted=False)
                proof = here.call("growkit.verification:verification_record", compared, bar)
                manifest["verification"] = proof
            _write_manifest_and_card(plan, folder, manifest, out.name)
        plan.checkpoint.check_unchanged(manifest["copied_files"])
        if optimizer is not None:
            state_files.check()
    return manifest


def _warn_of_missing_rows(plan: Plan, reporter: Reporter) -> None:
    """A tokenizer larger than the embedding is copied as it is; a smaller one is usual."""
    rows = plan.source_sizes.get("vocab")
    if rows is None or not may_have_more_than(plan.checkpoint.path, rows):
        return
    tokens = tokens_of(plan.checkpoint.path)
    if tokens is not None and tokens > rows:
        reporter.warn(
            f"the tokenizer has {tokens} tokens and the embedding {rows} rows, so texts with the "
            "others can be neither trained on nor generated: give the embedding rows for them with "
            f"--tokenizer {plan.checkpoint.path}"
        )


def _write_tensors(
    plan: Plan,
    folder: Path,
    shard_plan: ShardPlan,
    threads: int | None,
    reporter: Reporter,
) -> None:
    lock = threading.Lock()
    reported: set[str] = set()

    def non_finite(name: str) -> None:
        with lock:
            if name not in reported:
                reported.add(name)
                reporter.warn(f"tensor {name!r} holds NaN or infinite weights")

    with reporter.progress("write", plan.total_bytes) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.advance(count)

        with ShardWriter(folder, shard_plan) as writer:
            execute(plan, writer, threads=threads, advance=advance, on_non_finite=non_finite)
            bar.describe("make durable")


def _grown_optimizer(plan: Plan, request: GrowthRequest, folder: Path | None) -> GrownState | None:
    """The optimizer state to write, or None: there is none, or it is reset."""
    if request.optimizer_state == "reset":
        return None
    from growkit.optimizer_state.find import LAYOUTS, find_state

    state = find_state(plan.checkpoint.path, folder)
    if state is None:
        if request.optimizer_state is not None:
            raise UsageError(
                f"--optimizer-state {request.optimizer_state}: there is no optimizer state beside "
                f"{str(plan.checkpoint.path)!r}.",
                f"Looked for: {LAYOUTS}. --optimizer-from names another folder.",
            )
        return None
    from growkit.optimizer_state.write import GrownState

    usual = "reset-new" if request.symmetry == "rms" else "grow"
    return GrownState(plan, state, request.optimizer_state or usual)


def _write_optimizer(
    optimizer: GrownState, folder: Path, threads: int | None, reporter: Reporter
) -> None:
    from growkit.optimizer_state.store import FOLDER

    lock = threading.Lock()
    with reporter.progress("optimizer", optimizer.total_bytes) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.advance(count)

        optimizer.write(folder / FOLDER, threads=threads, advance=advance)


def _brings_model_code(plan: Plan) -> bool:
    """The code that the source brings along is that of its class. Ours is written anew."""
    before, after = plan.checkpoint.config.get("model_type"), plan.config["model_type"]
    return bool(before == after and after not in MODEL_TYPES)


def _replaced(plan: Plan) -> set[str]:
    """Files that the grown folder has of its own; a new tokenizer replaces the whole old one."""
    files = set(plan.growth.files)
    return files | set(TOKENIZER_FILES) if "tokenizer.json" in files else files


def _side_file_bytes(plan: Plan, manifest: dict[str, Any]) -> int:
    """About what the files beside the tensors take."""
    source = plan.checkpoint.path
    names = [name for name in manifest["copied_files"] if (source / name).is_file()]
    sizes = [(source / name).stat().st_size for name in names]
    return sum(sizes) + 2 * len(manifest_text(manifest)) + SIDE_FILE_BYTES


def _write_side_files(plan: Plan, folder: Path, manifest: dict[str, Any], name: str) -> None:
    config = dict(plan.config)
    before, after = plan.checkpoint.config.get("model_type"), config["model_type"]
    copy_side_files(
        plan.checkpoint.path,
        folder,
        model_code=_brings_model_code(plan),
        leave_out=_replaced(plan),
    )
    if after in MODEL_TYPES:
        config["auto_map"] = export_code(folder, after)
    elif before != after:
        config.pop("auto_map", None)
    config["growkit"] = config_block(manifest)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / CONFIG, text)
    _write_manifest_and_card(plan, folder, manifest, name)


def _write_manifest_and_card(plan: Plan, folder: Path, manifest: dict[str, Any], name: str) -> None:
    write_file(folder / MANIFEST, manifest_text(manifest))
    card = model_card(plan.checkpoint.path, manifest, name)
    write_file(folder / README, card)
