"""The table of growths: one row and one file of this folder for each.

From the rows come the flags of ``plan`` and ``grow`` and their help, the keys of a recipe and their
validation, the names of axes in every table, and what ``inspect`` says can grow. A row is plain
data and imports nothing, so that ``growkit --help`` stays fast; the file beside it is imported when
the growth is asked for::

    make(row, value, request) -> Operator    the operator of a request; value is read already; None
                                             where another row's operator does it too
    grows(row, shape) -> bool                a checkpoint can be grown so; without: it has the axis
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

from growkit.core.errors import UsageError

SYMMETRIES = ("split", "even", "noise", "rms")
Label = str | Callable[[Mapping[str, int]], str]


@dataclass(frozen=True, kw_only=True)
class Option:
    """A flag of ``plan`` and ``grow``, and a key of a recipe's ``grow`` section.

    Attributes:
        key: its name; ``expert_reinit`` is the flag ``--expert-reinit``.
        help: one sentence for ``--help``.
        kind: ``str``, ``int``, ``float``, ``bool`` (a switch) or ``Path``, of which a manifest
            holds the name alone.
        values: words that it may be; none: any.
        check: raises UsageError for a value that it cannot have.
        needs: key of the growth without which it has no effect.
        size: it says how large, not how.
        axis: axis whose number it changes.
        label: what people call the axis, with the config field where that differs; or made of the
            model's sizes. Empty where another row names the axis.
    """

    key: str
    help: str
    kind: type = str
    values: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None
    needs: str = ""
    size: bool = False
    axis: str = ""
    label: Label = ""

    @property
    def flag(self) -> str:
        return f"--{self.key.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class OperatorRow(Option):
    """A growth.

    Attributes:
        stage: growths of an earlier stage are applied first; within a stage, as the table has them.
        file: module of this folder that makes the operator; by default named as the key.
        unit: what the axis counts, in refusals; by default the axis in the plural.
        is_amount: the value is a size (``x2``, ``+4``, ``48``), else a text or a switch.
        options: how it may be done. What several growths ask stands at the first of them.
    """

    stage: int
    file: str = ""
    unit: str = ""
    is_amount: bool = True
    size: bool = True
    options: tuple[Option, ...] = ()

    @property
    def module(self) -> ModuleType:
        return import_module(f"{__name__}.{self.file or self.key}")


def _whole_multiple(multiple: int) -> None:
    if multiple < 1:
        raise UsageError(f"--pad-vocab-to {multiple} is no multiple.", "Give 128, for example.")


def _share_of_probability(share: float) -> None:
    if not 0.0 < share < 1.0:
        raise UsageError(
            f"--new-token-bias {share} is no share of the probability.",
            "Give a number above 0 and below 1: 0.001 leaves new tokens a thousandth.",
        )


def _part_of_units(part: float) -> None:
    if not 0.0 <= part <= 1.0:
        raise UsageError(
            f"--expert-reinit {part} is no part of the units.",
            "Give a number from 0 to 1; 0.5 is usual (Drop-Upcycling).",
        )


def _some_units(flag: str) -> Callable[[int], None]:
    def check(units: int) -> None:
        if units < 1:
            raise UsageError(f"{flag} {units} leaves no FFN units.", "Give a positive number.")

    return check


def _shrinks(factor: float) -> None:
    if not 0.0 < factor <= 1.0:
        raise UsageError(
            f"--shrink {factor} is no factor that shrinks.",
            "Give a number above 0 and up to 1; 0.4 is usual (shrink and perturb).",
        )


def _perturbs(factor: float) -> None:
    if not 0.0 <= factor < inf:
        raise UsageError(
            f"--perturb {factor} is no factor of a start from scratch.",
            "Give a number of 0 or more; 1 adds the class's own initialisation.",
        )


ROWS = (
    OperatorRow(
        key="signal_heads",
        stage=2,
        help="Signal heads; the noise heads stay (group-differentiated growth).",
        axis="signal_head",
        label="signal heads",
        options=(
            Option(
                key="new_heads",
                values=("copy", "zero"),
                help="copy, or zero: random heads with zero output. Default: copy.",
            ),
        ),
    ),
    OperatorRow(
        key="noise_heads",
        stage=2,
        help="Noise heads; the signal heads stay.",
        axis="noise_head",
        label="noise heads",
    ),
    OperatorRow(
        key="uniform_heads",
        stage=1,
        help="Signal and noise heads at the same ratio (count both).",
        axis="signal_head",
    ),
    OperatorRow(
        key="heads",
        stage=2,
        help="Query and key/value heads at their ratio (count the query heads).",
        axis="query_head",
    ),
    OperatorRow(
        key="query_heads",
        stage=2,
        help="Query heads; the key/value heads and the KV cache stay.",
        axis="query_head",
        label="query heads",
    ),
    OperatorRow(
        key="kv_heads",
        stage=2,
        help="Key/value heads (pairs, in differential attention); the KV cache grows.",
        axis="kv_head",
        label=lambda sizes: "key/value " + ("pairs" if sizes.get("parts") == 2 else "heads"),
    ),
    OperatorRow(
        key="head_dim",
        stage=2,
        help="Channels a head; not under plain rotary position encoding.",
        axis="head_dim",
        label="head_dim",
        unit="channels a head",
    ),
    OperatorRow(
        key="layers",
        file="depth",
        stage=4,
        help="Layers (encoder's, where there are two stacks); see --new-layers.",
        axis="layer",
        label=lambda sizes: "encoder layers" if "decoder_layer" in sizes else "layers",
        options=(
            Option(
                key="new_layers",
                values=("identity", "random", "copy", "interposed", "aligned"),
                help="What new layers begin as: identity (exact), random (the class's own "
                "initialisation), copy (stacked: 0 1 0 1), interposed (0 0 1 1) or aligned (mean "
                "of two matched neighbours); all but the first change the function. Default: "
                "identity.",
            ),
            Option(
                key="depth_method",
                values=("identity", "stack", "interpolate", "solar"),
                help="The older name of --new-layers: identity, stack (copy), interpolate "
                "(interposed) or solar; copies take optimizer moments along.",
            ),
            Option(
                key="layer_placement",
                help="auto, even, end, pattern (the class's order of layer kinds continues), or "
                "indices such as 3,7,11. Default: auto (pattern where even would break it, else "
                "even).",
            ),
        ),
    ),
    OperatorRow(
        key="layers_from",
        file="slices",
        stage=4,
        help="Slices of the layers, half-open: 0-24,8-32. Another function.",
        axis="layer",
        is_amount=False,
    ),
    OperatorRow(
        key="decoder_layers",
        file="depth",
        stage=4,
        help="Layers of an encoder-decoder's decoder.",
        axis="decoder_layer",
        label="decoder layers",
    ),
    OperatorRow(
        key="ffn",
        stage=3,
        help="FFN width (intermediate_size).",
        axis="ffn",
        label=lambda sizes: (
            "expert width (moe_intermediate_size)"
            if "expert_step" in sizes
            else "FFN width (intermediate_size)"
        ),
        unit="FFN units",
        options=(
            Option(
                key="new_units",
                values=("copy", "zero"),
                help="copy, or zero: random FFN units with zero output. Default: copy.",
            ),
        ),
    ),
    OperatorRow(
        key="hidden",
        stage=3,
        help="Hidden size: whole multiples by copies, any other by padding.",
        axis="hidden",
        label="hidden size",
        unit="hidden channels",
        options=(
            Option(
                key="hidden_method",
                values=("auto", "tile", "pad"),
                help="tile (copies), pad (any size) or auto. Default: auto.",
            ),
        ),
    ),
    OperatorRow(
        key="experts",
        stage=5,
        help="Experts: copies of the FFN with a new router, or copies of experts.",
        axis="expert",
        label="experts",
        options=(
            Option(
                key="experts_per_token",
                kind=int,
                needs="experts",
                size=True,
                axis="active_expert",
                label="experts per token",
                help="Experts a token is routed to. Default: 2, or as many times more as experts.",
            ),
            Option(
                key="expert_layers",
                needs="experts",
                help="Layers of the written model that get experts, of a dense one: indices and "
                "half-open ranges, 1,3,8-16; the others keep their FFN. Default: all.",
            ),
            Option(
                key="expert_width",
                kind=int,
                check=_some_units("--expert-width"),
                needs="experts",
                axis="ffn",
                help="FFN units of an expert, of a dense model: a part of the FFN each, so that "
                "several experts have it all (fine-grained experts). Default: all units.",
            ),
            Option(
                key="shared_expert_width",
                kind=int,
                check=_some_units("--shared-expert-width"),
                needs="experts",
                axis="ffn_shared",
                label="FFN width of the shared expert",
                help="FFN units of the shared expert, where the class has one (Qwen2-MoE). "
                "Default: all units.",
            ),
            Option(
                key="expert_reinit",
                kind=float,
                check=_part_of_units,
                needs="experts",
                help="Part of each new expert's FFN units that is drawn anew (Drop-Upcycling); not "
                "exact. Default: 0.",
            ),
        ),
    ),
    OperatorRow(
        key="tokenizer",
        kind=Path,
        file="vocabulary",
        stage=0,
        is_amount=False,
        help="Folder of another tokenizer: tokens keep their rows, new ones get some.",
        axis="vocab",
        options=(
            Option(
                key="vocab_init",
                values=("subwords", "mean", "noise-mean", "zero"),
                help="Rows of new tokens: subwords (mean of the old tokens that spell it), mean, "
                "noise-mean or zero. Default: subwords.",
            ),
            Option(
                key="new_token_bias",
                kind=float,
                check=_share_of_probability,
                help="Share of the probability that all new tokens together get at most (0.001); "
                "by the head's bias, where there is one. Default: no bias of their own.",
            ),
        ),
    ),
    OperatorRow(
        key="add_tokens",
        kind=Path,
        file="vocabulary",
        stage=0,
        is_amount=False,
        help="File of tokens to add, one a line; a tab and 'special' marks a special one.",
        axis="vocab",
    ),
    OperatorRow(
        key="vocab",
        file="vocabulary",
        stage=0,
        help="Rows of the vocabulary; further rows belong to no token yet.",
        axis="vocab",
        label="vocabulary",
        unit="rows of the vocabulary",
    ),
    OperatorRow(
        key="pad_vocab_to",
        file="vocabulary",
        stage=0,
        kind=int,
        is_amount=False,
        check=_whole_multiple,
        help="Round the rows of the vocabulary up to a whole multiple, such as 128.",
        axis="vocab",
    ),
    OperatorRow(
        key="untie_embeddings",
        file="untie",
        stage=0,
        kind=bool,
        is_amount=False,
        help="Write an output projection of its own, equal to the embedding.",
    ),
)

# Recipe key -> its row, in the order in which people read them.
OPERATORS: dict[str, OperatorRow] = {row.key: row for row in ROWS}

# What holds for the whole growth.
COMMON = (
    Option(
        key="symmetry",
        values=SYMMETRIES,
        help="Shares of copies: split, even, noise, or rms (even; copies part by the optimizer). "
        "Default: split.",
    ),
    Option(
        key="noise_snr_db",
        kind=float,
        help="Signal-to-noise ratio of --symmetry noise, in dB.",
    ),
    Option(
        key="warm_start",
        values=("shrink-pad-perturb",),
        help="Shrink old weights, pad with zeros, add a start from scratch; not exact.",
    ),
    Option(
        key="shrink",
        kind=float,
        needs="warm_start",
        check=_shrinks,
        help="Factor on old weights in a warm start. Default: 0.4.",
    ),
    Option(
        key="perturb",
        kind=float,
        needs="warm_start",
        check=_perturbs,
        help="Factor on the start from scratch that a warm start adds. Default: 1.",
    ),
    Option(key="seed", kind=int, help="Of every random number. Default: 0."),
    Option(
        key="optimizer_state",
        values=("grow", "reset", "reset-new"),
        help="Of the run that made the checkpoint: grow, reset, or reset-new (copies begin with "
        "zero moments). Default: grow, where it is found.",
    ),
    Option(
        key="part",
        help="Part of a multimodal model that grows: text, or a tower by the name of its config "
        "(vision, audio). Default: text.",
    ),
    Option(
        key="drop_tensors",
        help="Regular expression of tensors that the class does not read (multi-token prediction), "
        "to be left out.",
    ),
    Option(
        key="format",
        help="Family to write: the source's own, or gda for differential checkpoints.",
    ),
)

# Axes that no growth is named after, and the order in which a model's sizes are told.
OTHER_LABELS = {
    "dense_ffn": "FFN width of layers without experts (intermediate_size)",
}
TOLD = (
    *("layer", "decoder_layer", "hidden", "ffn", "dense_ffn", "expert", "active_expert"),
    *("query_head", "signal_head", "noise_head", "kv_head", "head_dim", "vocab"),
)


def all_options() -> list[Option]:
    """Every flag of a growth, in the order of the help: each row with its options behind it."""
    rows = [option for row in OPERATORS.values() for option in (row, *row.options)]
    return [*rows, *COMMON]


def rows_as_applied() -> list[OperatorRow]:
    """The rows in the order in which growths that are asked for together are applied."""
    return sorted(OPERATORS.values(), key=lambda row: row.stage)


def axis_labels(sizes: Mapping[str, int]) -> dict[str, str]:
    """Axis -> what people call it, for a model of these sizes; in the order in which to tell them.

    Axes that the model has not are in it too.
    """
    labels: dict[str, Label] = dict(OTHER_LABELS)
    for option in all_options():
        if option.axis and option.label:
            labels[option.axis] = option.label
    order = [*TOLD, *(axis for axis in labels if axis not in TOLD)]
    told = {axis: labels[axis] for axis in order if axis in labels}
    return {axis: text if isinstance(text, str) else text(sizes) for axis, text in told.items()}


def units_of(axis: str) -> str:
    """What an axis counts: ``FFN units``."""
    named = (row.unit for row in OPERATORS.values() if row.axis == axis and row.unit)
    return next(named, axis.replace("_", " ") + "s")
