"""A training recipe for the checkpoint at hand, with the reason of every number in it. No torch.

It is a first recipe that works, to be edited: lengths are those of the model and the text, the
batch is what fits into memory, and the learning rate follows a stated rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.advice.facts import new_entries
from growkit.advice.memory import TrainingSetup, training_memory
from growkit.checkpoint import open_checkpoint
from growkit.core.quantities import counted, human_bytes, human_count
from growkit.data.recipe import DataSection
from growkit.data.sources import Corpus, corpus_of
from growkit.families import check_trainable
from growkit.record.manifest import read_manifest
from growkit.record.plan_report import main_dtype, stored_dtypes

# Parameters and peak learning rate of GPT-3's sizes (arXiv:2005.14165, table 2.1).
GPT3_PEAKS = (
    (125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (2.7e9, 1.6e-4), (6.7e9, 1.2e-4),
    (13e9, 1e-4), (175e9, 0.6e-4),
)  # fmt: skip
# Of that peak: a run that continues forgets more of the old text the higher it warms up again
# (arXiv:2308.04014), so half of it is the careful choice.
PART_OF_PEAK = 0.5

LONGEST = 8192  # tokens of a sequence; longer ones are asked for by the recipe's owner
FEWEST_SEQUENCES = 200
FEWEST_STEPS = 500
LARGEST_STEP = 1 << 19  # tokens
WITHOUT_TEXT = 200_000_000  # tokens of a run whose text is not known yet
SAMPLE_BYTES = 1 << 20
BYTES_PER_TOKEN = 4.0  # of English text, where the tokenizer cannot be asked
SPARE = 0.9  # part of the memory that is planned with


@dataclass(frozen=True)
class TextSize:
    """How much text there is. ``tokens`` is an estimate: bytes over those per token of a sample,
    which is 0 where there are only token files, whose tokens are counted."""

    files: int
    size: int
    tokens: int
    bytes_per_token: float


def text_size(corpus: Corpus, tokenizer: Path | None, vocabulary: int = 0) -> TextSize:
    """Count a corpus by its bytes, and by the tokens of a sample of it.

    Args:
        tokenizer: folder with a tokenizer.json; None: one byte is one token.
        vocabulary: of the tokenizer, from which token files may have the type of their ids.
    """
    sample = b""
    texts = [source for source in corpus.sources if not source.tokens]
    for number, source in enumerate(texts, 1):
        for record in source.records(0) if source.dataset is None else ():
            sample += record.text[:SAMPLE_BYTES].encode()
            if len(sample) >= SAMPLE_BYTES * number // len(texts):
                break
    size = sum(source.size for source in texts) or len(sample)
    ratio = 1.0 if tokenizer is None else bytes_per_token(tokenizer, sample[:SAMPLE_BYTES])
    files = sum(len(source.files) + len(source.tokens) for source in corpus.sources)
    known = sum(len(f.as_type(vocabulary)) for source in corpus.sources for f in source.tokens)
    size_known = sum(source.size for source in corpus.sources if source.tokens)
    return TextSize(files, size + size_known, round(size / ratio) + known, ratio if texts else 0.0)


def bytes_per_token(folder: Path, sample: bytes) -> float:
    """Of a sample of text, by the folder's tokenizer.json; :data:`BYTES_PER_TOKEN` without one."""
    if not sample or not (folder / "tokenizer.json").is_file():
        return BYTES_PER_TOKEN
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # a damaged file; the run says so
        return BYTES_PER_TOKEN
    encoded = tokenizer.encode(sample.decode(errors="ignore"), add_special_tokens=False)
    return len(sample) / max(len(encoded.ids), 1)


def learning_rate(parameters: int) -> float:
    """Half the peak of GPT-3's model of this size, by linear interpolation of the logarithms."""
    sizes = [math.log(size) for size, _ in GPT3_PEAKS]
    peaks = [math.log(peak) for _, peak in GPT3_PEAKS]
    import numpy as np

    peak = math.exp(float(np.interp(math.log(max(parameters, 1)), sizes, peaks)))
    return float(f"{PART_OF_PEAK * peak:.1e}")


def activation_bytes(config: Mapping[str, Any], length: int) -> int:
    """Of one sequence with activation checkpointing in bfloat16: the input of every layer, one
    layer at work (34 bytes per token and channel, arXiv:2205.05198), logits and their gradient."""
    names = ("hidden_size", "n_embd", "d_model")
    hidden = int(next((config[name] for name in names if config.get(name)), 1024))
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 24)
    vocabulary = int(config.get("vocab_size") or 50_000)
    return length * (2 * hidden * layers + 34 * hidden + 10 * vocabulary)


def new_run_recipe(
    checkpoint: Path, text: Path | None = None, memory: int = 24 * 10**9, file: str = "recipe.yaml"
) -> str:
    """The text of a recipe that continues to train ``checkpoint``.

    Args:
        text: a file or folder of text; None: a place to fill in.
        memory: bytes of the accelerator.
        file: its name, for the commands in its head.

    Raises:
        UsageError, CheckpointError: the folder or the text cannot be used.
    """
    with open_checkpoint(checkpoint) as folder:
        config, dtype = folder.config, main_dtype(stored_dtypes(folder))
        shapes = {name: info.shape for name, info in folder.tensors.items()}
    check_trainable(config, checkpoint)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    context = config.get("max_position_embeddings") or config.get("n_positions")
    length = min(int(context or LONGEST), LONGEST)
    size = None
    if text is not None:
        section = DataSection(files=[text])
        size = text_size(corpus_of(section), checkpoint)
        while length > 128 and length * FEWEST_SEQUENCES > size.tokens:
            length //= 2
    tokens = WITHOUT_TEXT if size is None else size.tokens
    held_out = min(max(float(f"{16 * length / tokens:.1g}"), 0.001), 0.05)
    if size is not None:
        tokens = round(tokens * (1 - held_out))
    setup = TrainingSetup(bf16_autocast=True)
    fixed = training_memory(shapes, {}, setup).total
    each = activation_bytes(config, length)
    step = min(max(tokens // FEWEST_STEPS, length), LARGEST_STEP)
    room = int((SPARE * memory - fixed) / each)
    batch = 1 << max(min(room, step // length, 64), 1).bit_length() - 1
    accumulation = max(round(step / (batch * length)), 1)
    steps = math.ceil(tokens / (batch * length * accumulation))
    where = '"YOUR_TEXT/"' if text is None else json.dumps(str(text), ensure_ascii=False)
    fits = (
        f"{human_bytes(fixed)} of weights, gradients and AdamW, and about {human_bytes(each)} for "
        f"each sequence, of {human_bytes(memory)}"
    )
    if room < 1:
        fits += ": TOO MUCH for one device; see parallel.strategy: fsdp in docs/distributed.md"
    lines = [
        f"# growkit train {file} --dry-run        what it comes to; writes nothing",
        f"# growkit train {file} --out RUN        the run; the same command continues it",
        "#",
        f"# Continues to train {checkpoint.name}: {human_count(parameters)} parameters, {dtype}.",
        "# A first choice, to be edited; every key: docs/training.md.",
        "model:",
        f"  checkpoint: {json.dumps(str(checkpoint), ensure_ascii=False)}",
        f"  dtype: float32             # to train in; the result is stored in {dtype} again",
        "data:",
        f"  files: [{where}]" + ("" if text is not None else "     # <- files or folders of text"),
        *_about_text(size),
        f"  sequence_length: {length}".ljust(28) + f" # {_about_length(context, length)}",
        f"  eval_fraction: {held_out:g}".ljust(28) + " # held out: about 16 sequences or more",
        "  max_eval_tokens: 500000",
        "training:",
        f"  max_tokens: {tokens}".ljust(28)
        + (" # one pass over the text" if size else " # <- how long to train"),
        "  # Half the peak of GPT-3 at this size (arXiv:2005.14165, table 2.1). It warms up and",
        "  # decays again; a higher one learns the new text faster and forgets more of the old",
        "  # (arXiv:2308.04014).",
        f"  learning_rate: {learning_rate(parameters):.1e}",
        "  schedule: wsd               # warm-up, stable, decay: may be made longer later",
        "  warmup_steps: 0.02          # below 1: a part of all steps",
        "  decay_steps: 0.2",
        "  weight_decay: 0.1",
        f"  # {fits}",
        f"  per_device_train_batch_size: {batch}",
        f"  gradient_accumulation_steps: {accumulation}".ljust(36)
        + f"# {batch * accumulation * length:,} tokens per step, {counted(steps, 'step')}",
        "  bf16: true                  # bfloat16 arithmetic; false on processors without it",
        "  gradient_checkpointing: true  # a third more time, far less memory",
        *_about_growth(checkpoint, shapes, parameters),
        f"  logging_steps: {max(steps // 200, 1)}",
        f"  eval_steps: {max(steps // 20, 1)}",
        f"  save_steps: {max(steps // 10, 1)}",
        "  report_to: []               # or [tensorboard], [wandb]",
    ]
    return "\n".join(lines) + "\n"


def _about_text(size: TextSize | None) -> list[str]:
    if size is None:
        return []
    count = f"{counted(size.files, 'file')}, {human_bytes(size.size)}, about "
    return [f"  # {count}{human_count(size.tokens)} tokens ({size.bytes_per_token:.2f} bytes each)"]


def _about_length(context: Any, length: int) -> str:
    if not context:
        return "the config states no longest context"
    if length == context:
        return "the model's whole context"
    why = "the text is short" if length < min(int(context), LONGEST) else "longer costs memory"
    return f"the model's context is {int(context):,}; {why}"


def _about_growth(checkpoint: Path, shapes: Mapping[str, Any], parameters: int) -> list[str]:
    """What is said of a folder that was grown: how to train its new slots first."""
    new = (read_manifest(checkpoint) or {}).get("new_parameters") or {}
    count = sum(new_entries(shapes[name], part) for name, part in new.items() if name in shapes)
    if not count:
        return []
    return [
        f"  # {human_count(count)} parameters ({count / parameters:.0%}) are new since the growth:",
        "  # train: {new_then_all: 0.1}  # train these alone in the first tenth",
    ]
