"""Families as data: tables that :mod:`growkit.derive` made of a class of transformers and proved.

A table is one JSON object (its form: :data:`KEYS`). It ships in ``derived_tables/``, or lies in the
user's cache folder, as ``TYPE-HASH.json``; reading it imports no torch. It holds for configs of its
model type whose flags are those that it was derived with.

A dimension of a tensor is ``[reads, segments]``: it writes its units (0), reads them (1), or is a
norm's gain or bias over them (2). A segment is ``[over, [[axis, block], ...]]``: for
each unit of ``over`` the units of the axes that belong to it, ``block`` elements each. A block, as
any size, is a sum of products: ``[[2, "heads", "head_dim"], [4]]``; a name behind "/" divides.
``[["stored", name, dimension]]`` is as large as it is in the file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy as np

from growkit.core.errors import UsageError
from growkit.core.json_files import read_json_object
from growkit.families.base import (
    Config,
    Dim,
    Family,
    LayerRule,
    Link,
    Norm,
    Stack,
    Tensor,
    every_layer,
)
from growkit.families.head_dim_rules import HeadDimRule, PartialRotary
from growkit.families.layer_fields import (
    LABELS,
    factor_fields,
    factor_stated,
    leaf,
    made_of_factor,
    move_counts,
    move_entry,
    move_sections,
    with_values,
)
from growkit.families.unit_layout import IntArray, Layout, Sizes, Units

FORMAT = 1
SHIPPED = Path(__file__).with_name("derived_tables")
MAX_BYTES = 4_000_000
KEYS = {
    "format": "of this file",
    "model_type": "of config.json",
    "class": "name of the model class",
    "transformers": "version that it was derived with",
    "source": "hash of the files that define the class and its config",
    "date": "when",
    "place": "path of the part of the config that speaks of the layers",
    "flags": "path in that part -> value that a config must have",
    "kinds": "list in that part -> words that may stand in it",
    "defaults": "path -> value where config.json is silent",
    "implied": "path -> [rule, paths] where config.json is silent or null",
    "layers": "field, counts (field -> leading, trailing), period, lists (name -> period), other, "
    "first (layers at the beginning of a kind of their own), sections (fields that count the "
    "layers of sections one behind another)",
    "axes": "axis -> paths of the numbers that count it; PATH/2: a unit counts twice; "
    "FACTOR*SIZE%MULTIPLE: a factor of another size, rounded up",
    "numbers": "further paths that sizes depend on",
    "patterns": "which layers have a tensor: a name of one of them, and a rule for its config",
    "cost": "elements of a cache a layer and token, and width of all heads",
    "tied": "output projection equals the embedding: null (never), true, or by the flag (^flag: "
    "of the whole config)",
    "tensors": "role, name, dims, closes, passes_on, gain_offset, init, layers, experts, stack, "
    "keys (dimension, axis and part of attention keys)",
    "heads": "of the size of heads: scaled (the softmax divides by its root), rotary (field of the "
    "factor of rotated channels and its default, or null)",
    "whole": "axes that a norm runs over",
    "operators": "option -> proof (error, control, request) or why not",
    "stream": "of the hidden size: sqrt_embedding, root_divided, norm (eps_field, eps, centred, "
    "shared, shared_inputs: roles of what those norms read; or why not padded), tied (why it "
    "cannot grow with tied embeddings)",
    "fills": "axis of heads that fill the hidden size (so that both grow together) -> numbers that "
    "it is multiplied by for that; true: query_head, by none",
    "carried": "beginnings of the names of other parts, which are copied as they are stored",
    "projected": "of these, tensors with dimensions of the residual stream: [pattern of names, "
    "dimensions, null where it is as it is stored]",
    "copied": "patterns of stored tensors that the class ignores",
    "kind": "encoder or encoder_decoder; a decoder where it is silent",
    "prefix": "of the names of the model's body, which files may lack",
    "spellings": "path -> another name that config.json may hold it under",
    "divides": "the config class, if it wants the hidden size to be a multiple of the heads",
    "rounded": "widths that the class makes others of unless a flag has this value: flag, exact, "
    "stored (axis -> tensor, dimension, elements of a unit)",
    "blocks": "where config.json may have several entries for each layer: how many (each), fields "
    "that count them, list that has them, words that tell so",
    "older": "path -> an older name in config.json, which the class obeys first",
    "second": "the decoder's stack: field of its number, place of its part, counts, first",
}
Product = Sequence[Any]
# Names of classes whose files hold other tensors than those of the causal language model.
OTHER_HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "EncoderModel",
)

# Options that the proof of another one speaks for.
SPOKEN_FOR = {
    "--layers-from": "--layers",
    "--tokenizer": "--vocab",
    "--add-tokens": "--vocab",
    "--pad-vocab-to": "--vocab",
}
# Masks, positions and tables of angles that classes kept as buffers, and no longer read.
BUFFERS = (r".*\.(attn|attention)\.(bias|masked_bias)", r".*(inv_freq|position_ids)")
# The axis of heads inside a block that have no option of their own: it grows with the hidden size.
INNER = "inner_head"
# Words in lists of layer kinds that transformers itself reads as others.
OLDER_WORDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
# Config fields of groups of experts, of which some are chosen first: a twin has one.
GROUPS = ("n_group", "num_expert_group")

# Flags of losses, heads for other tasks, initialisation, kernels and precision: they change nothing
# that a growth could.
IDLE = frozenset([
    "default_language",
    "_attn_implementation", "_name_or_path", "add_cross_attention", "apply_spec_augment",
    "architectures", "attention_softmax_in_fp32", "attn_implementation", "auto_map",
    "auxiliary_concat_input", "bos_token_id", "classifier_activation", "classifier_bias",
    "classifier_pooling", "ctc_loss_reduction", "ctc_zero_infinity", "decoder_start_token_id",
    "deterministic_flash_attn", "disable_ngram_loss", "dtype", "eos_token_id",
    "gradient_checkpointing", "id2label", "init_device", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "mamba_ssm_cache_dtype", "model_type",
    "moe_shared_expert_overlap", "name_or_path", "onnx_export", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "quantization_config", "rescale_prenorm_residual", "return_dict",
    "scale_attention_softmax_in_fp32", "sep_token_id", "slow_but_exact", "sparse_prediction",
    "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "tf_legacy_loss", "time_step_init_scheme", "torch_dtype", "torchscript",
    "transformers_version", "use_associative_scan", "use_auxiliary_head", "use_bfloat16",
    "use_cache", "use_guided_attention_loss", "use_mamba_kernels", "use_mambapy",
    "use_mems_train",
])  # fmt: skip
# Functions of one number with f(0) = 0: what is proven with one of them holds with any other.
ACTIVATIONS = frozenset([
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_pytorch_tanh", "hardtanh", "leaky_relu", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "silu", "swish", "tanh",
])  # fmt: skip

_registered: list[dict[str, Any]] = []


# -- where tables are -----------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where tables that were derived here are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "growkit" / "derived"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "growkit" / "derived"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "growkit" / "derived"
    return Path.home() / ".cache" / "growkit" / "derived"


def file_stem(model_type: str) -> str:
    """The model type as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", model_type)[:80]


def tables_of(model_type: str) -> Iterator[dict[str, Any]]:
    """Tables of a model type: made in this process, in the user's cache, shipped."""
    yield from (table for table in _registered if table["model_type"] == model_type)
    for folder in (cache_folder(), SHIPPED):
        if folder.is_dir():
            for path in sorted(folder.glob(f"{file_stem(model_type)}-*.json")):
                table = _read(path)
                if table.get("format") == FORMAT and table.get("model_type") == model_type:
                    yield table


@lru_cache(maxsize=64)
def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, limit=MAX_BYTES)


def register(table: dict[str, Any]) -> None:
    """Use a table in this process, before any other of its type."""
    _registered.insert(0, table)


def forget(table: dict[str, Any]) -> None:
    """Undo :func:`register`."""
    _registered[:] = [known for known in _registered if known is not table]


@lru_cache(maxsize=1)
def shipped_types() -> tuple[str, ...]:
    """Model types with a shipped table."""
    return tuple(sorted({path.name.rpartition("-")[0] for path in SHIPPED.glob("*.json")}))


def derived_family(
    config: Config, names: Collection[str] = (), *, registered: bool = False
) -> Family | None:
    """The family of a config by a derived table; None where none fits.

    ``registered``: by one of this process alone.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    made = (table for table in _registered if table["model_type"] == model_type)
    for table in made if registered else tables_of(model_type):
        if not misfit(table, config):
            return _Reader(table, config, names).family()
    return None


def read_with(table: Mapping[str, Any], config: Config, names: Collection[str] = ()) -> Family:
    """The family of a config by this table."""
    return _Reader(table, config, names).family()


def layers_fed(config: Config) -> int:
    """First layers of a language model behind which features of images are added (Qwen3-VL), as
    the configs of its towers say."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        if isinstance(stated := part.get("deepstack_visual_indexes"), list):
            return len(stated)
        if part.get("deepstack_layer_map"):
            return sys.maxsize
    return 0


def of_every_layer(value: Any) -> Any:
    """One number instead of a list that says it of every layer; anything else as it is."""
    alike = isinstance(value, list) and value and all(entry == value[0] for entry in value)
    return value[0] if alike and type(value[0]) is int else value


def width_name(axis: str) -> str:
    """What the width of heads that fill the hidden size is called among the sizes."""
    return "head_width" if axis == "query_head" else f"{axis}_width"


def _is_word(value: Any, words: Collection[str]) -> bool:
    """A kind of layer is among these, by the name that it has today or had before."""
    return str(value) in words or OLDER_WORDS.get(str(value)) in words


def _suits(value: Any, wanted: Any, inner: Config, defaults: Config) -> bool:
    """A field of a config has the value that a table was derived for, or one as good."""
    if isinstance(wanted, list):  # ["same" or "unlike", another field]
        relation, name = wanted
        other = inner.get(name, defaults.get(name))
        return bool((value is None or value == other) == (relation == "same"))
    if isinstance(value, str) and {value, wanted} <= ACTIVATIONS:
        return True
    return bool(value == wanted or (not value and not wanted))


def misfit(table: Mapping[str, Any], config: Config) -> str:
    """The field in which a config is not of the kind that a table was derived for; or empty."""
    named = (config.get("architectures") or [table["class"]])[0]
    if named != table["class"] and ("kind" in table or str(named).endswith(OTHER_HEADS)):
        return "architectures"
    inner = leaf(config, tuple(table["place"]))
    if not isinstance(inner, Mapping):
        return ".".join(table["place"])
    for name, wanted in table["flags"].items():
        path = tuple(name.removeprefix("^").split("."))
        if path[-1] in IDLE:
            continue
        value = leaf(config if name.startswith("^") else inner, path)
        if value is None:
            value = table["defaults"].get(name)
        if not _suits(value, wanted, inner, table["defaults"]):
            return str(name)
    for paths in table["axes"].values():
        for name in paths:
            if leaf(inner, tuple(name.split("."))) == 0:  # Granite 4 without experts
                return str(name)
    for name, words in table["kinds"].items():
        value = inner.get(name)
        if isinstance(value, list) and not all(_is_word(entry, words) for entry in value):
            return str(name)
    return ""


# -- reading --------------------------------------------------------------------------------------


def evaluate(size: Sequence[Product], sizes: Mapping[str, int]) -> int:
    """A sum of products at these sizes."""
    total = 0
    for factor, *names in size:
        product = int(factor) * prod(sizes[name] for name in names if name[0] != "/")
        total += product // prod(sizes[name[1:]] for name in names if name[0] == "/")
    return total


class _Refused(dict[str, str]):
    """Option -> why not: whatever is not proven is not offered."""

    proven: set[str] | None = None

    def __contains__(self, option: object) -> bool:
        told = SPOKEN_FOR.get(str(option), option)
        return self.proven is not None and told not in self.proven

    def get(self, option: str, default: Any = None) -> Any:
        if option not in self:
            return default
        told = SPOKEN_FOR.get(option, option)
        return super().get(told, "it is not derived yet")


class _Reader:
    """Makes the family of one config."""

    def __init__(self, table: Mapping[str, Any], config: Config, names: Collection[str]) -> None:
        self.table, self.config, self.names = table, config, names
        self.prefix: str = table.get("prefix", "")
        if self.prefix and not any(name.startswith(self.prefix) for name in names):
            names = self._prefixed(names)
        self.place = tuple(table["place"])
        self.axes: dict[str, list[str]] = table["axes"]
        self.layer_field: str | None = table["layers"]["field"]
        self.stream: Mapping[str, Any] = table.get("stream", {})
        self.second: dict[str, Any] = table.get("second") or {}
        shapes = names if isinstance(names, Mapping) else {}
        self.stored = {
            name: tuple(shape)
            for name, info in shapes.items()
            if (shape := getattr(info, "shape", None)) is not None
        }
        fills = table.get("fills") or {}
        self.fills: dict[str, list[str]] = {"query_head": []} if fills is True else fills
        self.rounded: dict[str, Any] = table.get("rounded", {}).get("stored", {})
        self.blocks: dict[str, Any] = table.get("blocks", {})
        self.each = self._entries_of_a_layer()
        self.masks = self._masks(config, names)

    def family(self) -> Family:
        table = self.table
        tensors = tuple(self._tensor(entry) for entry in table["tensors"])
        if carried := tuple(table.get("carried", ())):
            tensors += tuple(
                Tensor(name, name, self._carried(name, shape))
                for name, shape in self.stored.items()
                if name.startswith(carried)
            )
        refused = _Refused(
            {name: proof["why"] for name, proof in table["operators"].items() if "why" in proof}
        )
        refused.proven = {name for name, proof in table["operators"].items() if "error" in proof}
        for option, why in self._refused_here():
            refused[option] = why
            refused.proven.discard(option)
        if "expert" not in self.axes and not self._stacks()[1:]:
            refused.proven.add("--experts")  # the operator says which dense models get some
        if not table["operators"]:  # the table of a twin, whose proof is under way
            refused.proven = None
        heads = "query_head" in self.axes
        family = Family(
            name=table["model_type"],
            model_types=(table["model_type"],),
            tensors=tensors,
            sizes=self._sizes,
            config_fields=self._fields,
            kv_elements=self._sum("kv_elements"),
            attention_flops=lambda sizes: 4 * self._sum("attended")(sizes),
            links=(_shared("query_head", "kv_head"),) if heads else (),
            per_layer_fields=(),
            layer_rules={n: _repeated(period) for n, period in table["layers"]["lists"].items()},
            layers_at=self.place,
            stacks=self._stacks(),
            stored_facts=self._stored_facts,
            norm=self._norm(),
            sqrt_embedding_scale=bool(self.stream.get("sqrt_embedding")),
            root_divided=tuple(self.stream.get("root_divided", ())),
            head_dim=self._head_dim_rule(),
            refusal=self._refusal,
            ignored=BUFFERS,
            prefix=self.prefix,
            spellings=table.get("spellings", {}),
            unread=tuple(table["copied"]),
            refused=refused,
            full_copies_only=lambda sizes: self._whole(),
            map_layers=self._map_layers,
            layer_period=table["layers"]["period"],
            hidden_along=tuple(axis for axis in self.fills if axis == INNER),
            scaled_by_depth="root" in table["layers"]["counts"].values(),
            first_copied={
                stack: first
                for stack, part in (("layer", table["layers"]), ("decoder_layer", self.second))
                if (first := part.get("first", 0))
            },
            origin=f"derived, proven on a twin with transformers {table['transformers']}",
        )
        return family.stored_as(self.names)

    def _prefixed(self, names: Collection[str]) -> Mapping[str, Any]:
        """The names of a file without the prefix of the model's body, with it."""
        outer = {t["name"] for t in self.table["tensors"] if not t["name"].startswith(self.prefix)}
        infos = names if isinstance(names, Mapping) else dict.fromkeys(names)
        return {n if n in outer else self.prefix + n: info for n, info in infos.items()}

    def _carried(self, name: str, shape: Sequence[int]) -> tuple[Dim, ...]:
        """Dimensions of a tensor of another part: as they are stored, but where it writes the
        residual stream."""
        dims = next((d for p, d in self.table.get("projected", ()) if re.fullmatch(p, name)), None)
        return tuple(
            self._dim(dims[place], single=False) if dims and dims[place] else Dim(_fixed(width))
            for place, width in enumerate(shape)
        )

    def _entries_of_a_layer(self) -> int:
        """How many entries the config has for each layer."""
        stated = leaf(self.config, self.place).get(self.blocks["list"]) if self.blocks else None
        several = isinstance(stated, list) and any(word in self.blocks["words"] for word in stated)
        return int(self.blocks["each"]) if several else 1

    def _stacks(self) -> tuple[Stack, ...]:
        """One of a decoder or an encoder; both of an encoder-decoder, whose target tokens meet
        their own past and the whole source, in two caches."""
        kind = self.table.get("kind", "decoder")
        if kind == "decoder":
            return (Stack(),)
        encoder = Stack("layer", attended=1.0, caches=0)
        return (encoder, Stack("decoder_layer", 1.5, 2)) if self.second else (encoder,)

    # -- sizes --------------------------------------------------------------------------------

    def number(self, config: Config, name: str, depth: int = 0) -> int:
        """A number of the config, or what the class makes of its absence.

        Raises:
            UsageError: neither is a whole number.
        """
        if fields := factor_fields(name):
            factor, of, multiple = fields
            stated = leaf(leaf(config, self.place), (factor,))
            stated = self.table["defaults"].get(factor) if stated is None else stated
            if not isinstance(stated, int | float):
                raise UsageError(f"config.json has {factor} = {stated!r}.", "Set it to a number.")
            rounding = self.number(config, multiple) if multiple else 1
            return made_of_factor(stated, self.number(config, of), rounding)
        name, _, divisor = name.partition("/")
        if divisor:
            return self.number(config, name, depth) // int(divisor)
        inner = config if name.startswith("^") else leaf(config, self.place)
        path = tuple(name.removeprefix("^").split("."))
        value = leaf(inner, path) if isinstance(inner, Mapping) else None
        if older := self.table.get("older", {}).get(name):
            value = leaf(inner, (older,)) or value
        if value is None and (other := self.table.get("spellings", {}).get(name)):
            value = inner.get(other)
        implied = self.table["implied"].get(name)
        if value is None and implied and depth < 4:
            rule, *sources = implied
            parts = [
                s if isinstance(s, int) else self.number(config, s, depth + 1) for s in sources
            ]
            if rule == "quotient":
                return parts[0] // max(1, parts[1])
            return prod(parts)
        if value is None:
            value = self.table["defaults"].get(name)
        value = of_every_layer(value)
        if isinstance(value, int) and name in self.blocks.get("fields", ()):
            value //= self.each
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UsageError(
                f"config.json has {name} = {value!r}.",
                f"Set {name} to a positive whole number"
                + (", the same for every layer." if isinstance(value, list) else "."),
            )
        return value

    def layer_count(self, config: Config) -> int:
        if self.layer_field:
            return self.number(config, self.layer_field)
        inner = leaf(config, self.place)
        lists = self.table["layers"]["counted_by"]
        value = inner.get(lists)
        if not isinstance(value, list):
            raise UsageError(f"config.json has no list {lists}.", "It says what the layers are.")
        return len(value)

    def _count(self, config: Config, stack: str) -> int:
        """Layers of a stack."""
        if stack == "layer":
            return self.layer_count(config)
        return self.number(config, self.second["field"])

    def _sizes(self, config: Config) -> dict[str, int]:
        sizes = {"layer": self.layer_count(config)}
        if self.second:
            sizes["decoder_layer"] = self._count(config, "decoder_layer")
        for axis, paths in self.axes.items():
            as_stored = axis in self.rounded and self._rounds(config)
            sizes[axis] = self.number(config, paths[0]) if paths and not as_stored else 1
            if as_stored:
                sizes[axis] = self._stored_width(axis)
        for name in self.table["numbers"]:
            sizes[f".{name}"] = self.number(config, name)
        if "kv_head" not in sizes and "query_head" in sizes:
            sizes["kv_head"] = sizes["query_head"]
        for axis, times in self.fills.items():
            whole = sizes["hidden"] * prod(sizes[f".{name}"] for name in times)
            sizes[width_name(axis)] = whole // max(1, sizes[axis])
        if "head_width" in sizes:
            sizes["head_dim"] = sizes["head_width"]
        sizes["tied"] = int(self._tied(config))
        for number, mask in enumerate(self._masks(config, ())):
            if mask is not None:
                sizes[f"layers:{number}"] = mask
        return sizes

    def _rounds(self, config: Config) -> bool:
        """The class makes other widths of those that this config states."""
        flag = self.table["rounded"]["flag"]
        value = leaf(leaf(config, self.place), tuple(flag.split(".")))
        value = self.table["defaults"].get(flag) if value is None else value
        return bool(value) != self.table["rounded"]["exact"]

    def _stored_width(self, axis: str) -> int:
        """Units of an axis as the file has them.

        Raises:
            UsageError: there is no file.
        """
        name, dim, block = self.rounded[axis]
        shape = self._shape(name)
        if shape is None:
            raise UsageError(
                f"config.json does not say how wide the FFN is: {self.table['class']} rounds "
                f"{self.axes[axis][0]} ({self.table['rounded']['flag']}).",
                "Give the folder with its weights.",
            )
        return int(shape[dim] // block)

    def _tied(self, config: Config) -> bool:
        """The output projection is the embedding."""
        rule, name = self.table["tied"], "tie_word_embeddings"
        if rule not in ("flag", "^flag"):
            return bool(rule)
        flag = leaf(config, (*self.place, name)) if rule == "flag" else None
        flag = config.get(name) if flag is None else flag
        default = self.table["defaults"].get(name if rule == "flag" else f"^{name}")
        return bool(default if flag is None else flag)

    def _stored_facts(self, names: Collection[str]) -> dict[str, int]:
        if any("{layer}" in name for name in names):  # names of a plan, not of a file
            return {}
        masks = self._masks(self.config, names)
        return {f"layers:{i}": mask for i, mask in enumerate(masks) if mask is not None}

    def _fields(self, sizes: Sizes) -> dict[str, Any]:
        changes: dict[tuple[str, ...], Any] = {
            self._path(field): sizes[name] * int(divisor or 1)
            for name, fields in self.axes.items()
            for field, _, divisor in (path.partition("/") for path in fields)
        }
        for name in [name for axis in self.axes for name in self.axes[axis] if "*" in name]:
            changes |= self._with_factor(name, changes.pop(self._path(name)), changes)
        if self.rounded and self._rounds(self.config):  # stated exactly from the first growth on
            kept = all(sizes[axis] == self._stored_width(axis) for axis in self.rounded)
            for name in (name for axis in self.rounded for name in self.axes[axis] if kept):
                changes.pop(self._path(name))
            if not kept:
                exact = self._path(self.table["rounded"]["flag"])
                changes[exact] = self.table["rounded"]["exact"]
        for name in (f for axis in self.axes if axis.startswith("ffn") for f in self.axes[axis]):
            path, value = self._path(name), changes.get(self._path(name))
            if name in self.table["implied"] and leaf(self.config, path) is None:
                silent = with_values(self.config, changes | {path: None})
                changes[path] = None if self.number(silent, name) == value else value
        for name, older in self.table.get("older", {}).items():
            if self._path(name) in changes and leaf(self.config, self._path(older)) is not None:
                changes[self._path(older)] = changes[self._path(name)]
        if self.layer_field:
            changes[self._path(self.layer_field)] = sizes["layer"] * self.each
        if self.second:
            changes[self._path(self.second["field"])] = sizes["decoder_layer"]
        flag = {"flag": "", "^flag": "^"}.get(str(self.table["tied"]))
        if flag is not None:
            changes[self._path(f"{flag}tie_word_embeddings")] = bool(sizes["tied"])
        if rotary := self._rotary():
            old, new = self._sizes(self.config)["head_dim"], sizes["head_dim"]
            rotated, inner = rotary.rotated(self.config, old), leaf(self.config, self.place)
            if new != old:
                written = rotary.rewritten(inner, new, rotated)
                changes |= {(*self.place, name): value for name, value in written.items()}
        for path, value in changes.items():
            if isinstance(leaf(self.config, path), list):  # stated for each layer
                changes[path] = [value] * sizes["layer"]
        if all(len(path) == 1 for path in changes):
            return {path[0]: value for path, value in changes.items()}
        grown = with_values(self.config, changes)
        return {path[0]: grown[path[0]] for path in changes}

    def _with_factor(
        self, name: str, width: int, changes: Mapping[tuple[str, ...], Any]
    ) -> dict[tuple[str, ...], Any]:
        """What states a width that the class makes of a factor; nothing if it does so already."""
        grown = with_values(self.config, changes)
        if self.number(grown, name) == width:
            return {}
        fields = factor_fields(name)
        assert fields is not None
        said = factor_stated(name, width, self.number(grown, fields[1]))
        return {self._path(field): value for field, value in said.items()}

    def _path(self, name: str) -> tuple[str, ...]:
        """Where the config has a field of the table."""
        if name.startswith("^"):
            return tuple(name[1:].split("."))
        return (*self.place, *name.split("."))

    def _map_second(self, config: Config, sources: Sequence[int]) -> dict[str, Any]:
        """What the config says of the decoder's layers, after they have moved."""
        if self.second["alone"]:
            return {}
        place = tuple(self.second["place"])
        old, inner = self._count(self.config, "decoder_layer"), leaf(self.config, place)
        moved = {
            name: entry
            for name, value in inner.items()
            if name != LABELS and (entry := move_entry(value, old, sources)) is not None
        }
        moved |= move_counts(inner, self.second["counts"], old, sources)
        grown = with_values(config, {(*place, name): value for name, value in moved.items()})
        return {place[0]: grown[place[0]]} if place else moved

    def _map_layers(self, config: Config, sources: Sequence[int], stack: str) -> dict[str, Any]:
        """What the config says of layers, after they have moved."""
        if min(sources) < 0:
            raise UsageError(
                f"The derived table of {self.table['model_type']} knows no layers made of none.",
                "Insert copies: leave --depth-method at identity.",
            )
        if stack != "layer":
            return self._map_second(config, sources)
        old = self.layer_count(self.config)
        fed = min(old, layers_fed(self.config))
        if self.table["operators"] and list(sources[:fed]) != list(range(fed)):
            raise UsageError(
                f"{self.table['class']} adds features of images behind its first {fed} layers "
                "(deepstack), so that no layer can be inserted between them.",
                f"Insert behind them: --layer-placement end, or indices from {fed - 1} on.",
            )
        inner = leaf(self.config, self.place)
        entries = [s * self.each + part for s in sources for part in range(self.each)]
        moved = {
            name: entry
            for name, value in inner.items()
            if name != LABELS
            and (entry := move_entry(value, old * self.each, entries)) is not None
            and name not in self.table["layers"].get("other", ())
            and not any(name in fields for fields in self.axes.values())
        }
        for name, period in self.table["layers"]["lists"].items():
            if inner.get(name) is None:
                kinds = [period[source % len(period)] for source in sources]
                made = _repeated(period)(config, len(sources))
                if kinds != made or any(kind != kinds[0] for kind in kinds):
                    moved[name] = kinds  # readers other than transformers have rules of their own
        stated = {**self.table["defaults"], **inner}
        moved |= move_counts(stated, self.table["layers"]["counts"], old, sources)
        moved |= move_sections(stated, self.table["layers"].get("sections", ()), entries)
        if not self.place:
            return moved
        grown = with_values(config, {(*self.place, name): v for name, v in moved.items()})
        return {self.place[0]: grown[self.place[0]]}

    def _refused_here(self) -> Iterator[tuple[str, str]]:
        """Options that this config alone stands against, and why."""
        inner = leaf(self.config, self.place)
        for name in GROUPS:
            value = inner.get(name, self.table["defaults"].get(name))
            if isinstance(value, int) and value > 1:
                yield "--experts", f"it chooses experts within groups ({name} = {value})"
        for name in self.axes.get("hidden", ())[1:]:
            said = leaf(self.config, self._path(name))
            hidden = self.number(self.config, self.axes["hidden"][0])
            if said is not None and said != hidden:
                yield "--hidden", f"{name[1:]} is {said}, and the hidden size {hidden}"
        if (why := self.stream.get("tied")) and self._tied(self.config):
            yield "--hidden", why

    def _whole(self) -> tuple[str, ...]:
        """Axes that a norm runs over; what norms all query heads norms all keys too."""
        whole = list(self.table["whole"])
        if "query_head" in whole and "kv_head" in self.axes:
            whole.append("kv_head")
        return tuple(dict.fromkeys(whole))

    def _head_dim_rule(self) -> HeadDimRule:
        """Whether the size of heads grows, and what goes with it."""
        said = self.table.get("heads")
        if not said:
            proof = self.table["operators"].get("--head-dim", {})
            return HeadDimRule(proof.get("why", "growth of head_dim is not derived"))
        scaled, along = bool(said["scaled"]), ("head_width",) if "query_head" in self.fills else ()
        return HeadDimRule("", lambda config: scaled, self._rotary(), along)

    def _rotary(self) -> PartialRotary | None:
        said = self.table.get("heads") or {}
        if not said.get("rotary"):
            return None
        field, default = said["rotary"]
        return PartialRotary(field, default, self.place)

    def _norm(self) -> Norm:
        """The norms over the residual stream."""
        norm = self.stream.get("norm", {"why": "it is not derived yet"})
        if "why" in norm:
            return Norm(refusal=norm["why"])
        shared = norm.get("shared", "") if norm["eps_field"] else ""
        inputs = tuple(norm.get("shared_inputs", ())) if shared else ()
        return Norm(norm["eps_field"], norm["eps"], norm["centred"], shared, inputs)

    def _refusal(self, config: Config, sizes: Sizes) -> str | None:
        if "query_head" in self.fills:
            heads, hidden, width = (sizes[name] for name in ("query_head", "hidden", "head_dim"))
            times = [sizes[f".{name}"] for name in self.fills["query_head"]]
            if heads * width != hidden * prod(times):
                return (
                    f"{self.table['class']} wants the hidden size to be heads x head size, and "
                    f"{heads} heads of {width} make {heads * width}, not {hidden}; grow --hidden "
                    "and --heads together"
                )
        if (name := self.table.get("divides")) and sizes["hidden"] % sizes["query_head"]:
            return (
                f"{name} refuses {self.axes['hidden'][0]} {sizes['hidden']} with "
                f"{self.axes['query_head'][0]} {sizes['query_head']}: it has to divide, even with "
                "an explicit head_dim"
            )
        if "kv_head" in sizes and "kv_head" not in self.axes:
            if sizes["kv_head"] != sizes["query_head"]:
                return (
                    f"{self.table['class']} has one key/value head for each query head, not "
                    f"{sizes['kv_head']} for {sizes['query_head']}; --heads grows both"
                )
        elif "kv_head" in sizes and sizes["query_head"] % sizes["kv_head"]:
            return (
                f"{sizes['query_head']} query heads cannot share {sizes['kv_head']} key/value heads"
            )
        return None

    def _sum(self, name: str) -> Callable[[Sizes], int]:
        return lambda sizes: evaluate(self.table["cost"][name], sizes)

    # -- tensors ------------------------------------------------------------------------------

    def _masks(self, config: Config, names: Collection[str]) -> list[int | None]:
        """Which layers have the tensors of each pattern: from the names, else by its rule."""
        inner = leaf(config, self.place)
        stated = {**self.table["defaults"], **inner}
        found: list[int | None] = []
        for pattern in self.table["patterns"]:
            layers = self._count(config, pattern.get("stack", "layer"))
            if "stack" in pattern and self.second["place"]:
                stated = dict(leaf(config, tuple(self.second["place"])))
            if names:
                here = [pattern["name"].replace("{layer}", str(i)) in names for i in range(layers)]
                exclusive = pattern.get("shape_rule")
                if not exclusive:
                    found.append(sum(1 << i for i, has in enumerate(here) if has))
                    continue
            found.append(_mask(pattern["rule"], stated, self.table["layers"]["lists"], layers))
        return found

    def _tensor(self, entry: Mapping[str, Any]) -> Tensor:
        pattern = entry.get("layers")
        predicate: Callable[[Sizes, int], bool] = every_layer
        if pattern is not None:
            rule = self.table["patterns"][pattern]["rule"]
            predicate = _in_mask(f"layers:{pattern}", str(rule[1]) if rule else "", entry["name"])
        tied = entry["role"] == "lm_head" and self.table["tied"] in ("flag", "^flag")
        closes = entry.get("closes")
        keys: dict[int, list[tuple[str, int]]] = {}
        for place, axis, part in entry.get("keys", ()):
            keys.setdefault(place, []).append((axis, part))
        return Tensor(
            role=entry["role"],
            name=entry["name"],
            # A tensor of three dimensions is written matrix by matrix.
            dims=tuple(
                self._dim(
                    dim,
                    single=len(entry["dims"]) > 2 and not place,
                    keys=keys.get(place),
                    layers=-1 if pattern is None else self.masks[pattern],
                )
                for place, dim in enumerate(entry["dims"])
            ),
            when=(lambda sizes: not sizes["tied"]) if tied else (lambda sizes: True),
            writes_residual=closes is not None,
            init=entry.get("init", "normal"),
            gain_offset=-closes if closes and closes < 0 else entry.get("gain_offset", 0.0),
            closed_at=closes if closes and closes > 0 else None,
            passes_on=entry.get("passes_on"),
            layers=predicate,
            stack=entry.get("stack", "layer"),
            of_experts=bool(entry.get("of_experts")),
        )

    def _dim(
        self,
        dim: Sequence[Any],
        *,
        single: bool,
        keys: Sequence[tuple[str, int]] | None = None,
        layers: int | None = -1,
    ) -> Dim:
        reads, segments = dim
        first = segments[0][1][0][1][0]
        if first[0] == "stored":  # a grid of patches: as the file has it, nothing grows there
            shape = self._shape(first[1], layers)
            if shape is None and "{layer}" in first[1]:
                return Dim(_untold(first[1]))
            return Dim(_fixed(shape[first[2]] if shape else 1))
        layout = _layout(segments, single=single)
        return Dim(layout, consumes=reads == 1, normed=reads == 2, keys=tuple(keys or ()))

    def _shape(self, name: str, mask: int | None = -1) -> tuple[int, ...] | None:
        """The shape of a stored tensor, in the first layer of these bits that has it."""
        if "{layer}" not in name:
            return self.stored.get(name)
        name = name.replace("{expert}", "0")
        layers = [n for n in range(self.layer_count(self.config)) if (mask or 0) >> n & 1]
        shapes = (self.stored.get(name.replace("{layer}", str(layer))) for layer in layers)
        return next((shape for shape in shapes if shape is not None), None)


def _in_mask(mask: str, field: str, tensor: str) -> Callable[[Sizes, int], bool]:
    def has(sizes: Sizes, layer: int) -> bool:
        if mask not in sizes:
            raise UsageError(
                f"config.json does not say which layers have {tensor}"
                + (f": {field} is missing." if field else "."),
                "Give the folder with its weights, or let transformers write the config anew: "
                "AutoConfig.from_pretrained(FOLDER).save_pretrained(FOLDER).",
            )
        return bool(sizes[mask] >> layer & 1)

    return has


def _mask(
    rule: Sequence[Any] | None, config: Mapping[str, Any], lists: Mapping[str, Any], layers: int
) -> int | None:
    """Bits of the layers that a rule picks; None where it cannot say."""
    if rule is None:
        return None
    kind, *rest = rule
    if kind == "list":
        name, words = rest
        values = config.get(name)
        if not isinstance(values, list):
            period = lists.get(name)
            if not period:
                return None
            values = [period[layer % len(period)] for layer in range(layers)]
        if len(values) < layers:
            return None
        picked = [_is_word(value, words) for value in values[:layers]]
    elif kind in ("index", "not index"):
        values = config.get(rest[0]) or []
        picked = [(layer in values) == (kind == "index") for layer in range(layers)]
    elif kind in ("first", "rest"):
        picked = [(layer < rest[0]) == (kind == "first") for layer in range(layers)]
    elif kind in ("below", "from"):
        edge = config.get(rest[0])
        if not isinstance(edge, int):
            return None
        picked = [(layer < edge) == (kind == "below") for layer in range(layers)]
    else:
        period, places = rest
        picked = [layer % period in places for layer in range(layers)]
    return sum(1 << layer for layer, has in enumerate(picked) if has)


def _repeated(period: Sequence[Any]) -> LayerRule:
    """The list that the class makes for any depth."""
    return lambda config, layers: [period[layer % len(period)] for layer in range(layers)]


def _shared(source: str, target: str) -> Link:
    """Consecutive units of ``source`` share one unit of ``target``."""

    def indices(sizes: Sizes) -> IntArray:
        return (np.arange(sizes[source]) * sizes[target] // sizes[source]).reshape(-1, 1)

    return Link(source, target, indices)


def _untold(name: str) -> Layout:
    """The dimension of a tensor that config.json says nothing of."""

    def layout(sizes: Sizes) -> Units:
        raise UsageError(
            f"config.json does not say how large {name} is.", "Give the folder with its weights."
        )

    return layout


def _fixed(width: int) -> Layout:
    return _layout([["", [["fixed", [[width]]]]]])


def _layout(segments: Sequence[Any], *, single: bool = False) -> Layout:
    """The units of a dimension: their common block, and each unit as so many parts of it.

    ``single``: blocks of one element.
    """
    plain = len(segments) == 1 and len(segments[0][1]) == 1
    if plain and segments[0][1][0][0] == "fixed":
        block = segments[0][1][0][1]

        def fixed(sizes: Sizes) -> Units:
            zero = np.zeros(1, np.int64)
            return Units(("fixed",), zero, zero, zero, evaluate(block, sizes))

        return fixed

    named = {name for _, items in segments for _, block in items for p in block for name in p[1:]}
    heads = sorted(named & {"head_dim", "head_width"})

    def layout(sizes: Sizes) -> Units:
        axes: list[str] = []
        blocks = [evaluate(block, sizes) for _, items in segments for _, block in items]
        # Several heads of one unit (q, k and v of GPT-NeoX) are parts, that grow each by itself.
        blocks += [sizes[name] for name in heads]
        common = 1 if single else gcd(*blocks) or 1
        rows: list[IntArray] = []
        used: dict[str, int] = {}
        for over, items in segments:
            columns = []
            count = sizes[over] if over else 1
            for axis, block in items:
                if axis not in axes:
                    axes.append(axis)
                parts = evaluate(block, sizes) // common
                units = (sizes[axis] if axis != "fixed" else 1) // count
                first = used.get(axis, 0)
                used[axis] = first + parts
                index = np.arange(count * units).reshape(count, units, 1)
                table = np.empty((count, units, parts, 3), np.int64)
                table[..., 0] = axes.index(axis)
                table[..., 1] = index
                table[..., 2] = np.arange(first, first + parts)
                columns.append(table.reshape(count, units * parts, 3))
            rows.append(np.concatenate(columns, axis=1).reshape(-1, 3))
        all_rows = np.concatenate(rows)
        return Units(
            tuple(axes), all_rows[:, 0].copy(), all_rows[:, 1].copy(), all_rows[:, 2].copy(), common
        )

    return layout
