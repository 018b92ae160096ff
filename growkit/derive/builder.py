"""Configs and models of one class of transformers, built from values that may not suit it.

Classes are built on the meta device where they can be, so that a config of 10^12 parameters costs
no more than a small one.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.core.errors import GrowkitError
from growkit.families.layer_fields import factor_fields, factor_stated
from growkit.verification.loading import class_of, reason
from growkit.verification.model_inputs import outputs
from growkit.verification.sight import Sight, open_eyes

Path = tuple[str, ...]
Values = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

TOKENS = (2, 12)


class Underivable(GrowkitError):
    """What stands in the way of a derived table, in one sentence."""

    def __init__(self, cause: str, remedy: str = "growkit has no table for this model.") -> None:
        super().__init__(cause, remedy)


def said_by(error: Exception) -> str:
    """What a class objects to, in one line."""
    if isinstance(error, GrowkitError):
        return error.cause.rstrip(".")
    return f"{type(error).__name__}: {reason(error)[:200]}"


def integers(config: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, int]]:
    """(path, value) of every whole number of the config, those of its parts included."""
    for name, value in config.items():
        if isinstance(value, bool) or name.startswith("_"):
            continue
        if isinstance(value, int):
            yield (*prefix, name), value
        elif isinstance(value, Mapping) and not (
            name in ("rope_parameters", "rope_scaling", "label2id")
            or any(not str(key).isidentifier() for key in value)  # of layers, or of tokens
        ):
            yield from integers(value, (*prefix, name))


def as_held(config: Any) -> tuple[Values, dict[str, Any]]:
    """What a config says, in the form in which its class holds it; and where that writes another
    one (Dory: two entries for each layer, attention and FFN): entries for each layer, the fields
    that count them, the list, and the words that stand there alone. Empty where it does not."""
    values: Values = json.loads(json.dumps(config.to_dict(), default=str))
    held = {name: vars(config).get(name) for name in values}
    for name, value in values.items():
        own = held[name]
        if not (isinstance(value, list) and isinstance(own, list) and 0 < len(own) < len(value)):
            continue
        each = len(value) // len(own)
        fields = [n for n, v in values.items() if type(held[n]) is int and v == each * held[n] > 0]
        if value[::each] == own and fields:
            blocks = {"each": each, "list": name, "fields": fields}
            values |= {n: held[n] for n in (name, *fields)}
            return values, blocks | {"words": sorted({str(v) for v in value} - set(map(str, own)))}
    return values, {}


class Builder:
    """Builds configs and models of one class.

    Attributes:
        model_type: of config.json.
        auto: the class, or Auto class, that loads such folders.
        sight: what its models are given beside token ids, where they have towers.
    """

    sight: Sight | None = None

    def __init__(self, config: Any, auto: Any = None) -> None:
        self.config_class = type(config)
        self.model_type: str = config.model_type
        self.auto = auto or _auto_class(config)

    def config(self, values: Mapping[str, Any]) -> Any:
        """A config object; raises whatever the class objects to."""
        whole = _with_sections(copy.deepcopy(dict(values)))
        config = self.config_class.from_dict(_with_factors(whole))
        if config.architectures is None:
            config.architectures = []  # an Auto class with several for a type goes through them
        return config

    def build(self, values: Mapping[str, Any], device: str = "cpu") -> nn.Module:
        """A model with random weights in float32, with the plainest kernels."""
        config = self.config(values)
        config._attn_implementation = "eager"
        with torch.device(device):
            model = self.auto.from_config(config, dtype=torch.float32)
        plain_kernels(model)
        result: nn.Module = model.eval()
        if self.sight is not None and device == "cpu":
            open_eyes(result, self.sight)
        return result

    def shapes(self, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the module's state, on the meta device where the class can be built there."""
        try:
            model = self.build(values, "meta")
        except Exception:  # some constructors compute with the numbers
            with _Bounded():
                model = self.build(values)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _with_factors(values: Values) -> Values:
    """Widths for which the class has a factor of another size, as that factor."""
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for name in [n for n in part if isinstance(n, str) and factor_fields(n)]:
            width, fields = part.pop(name), factor_fields(name)
            if fields is not None and isinstance(width, int):
                part |= factor_stated(name, width, part[fields[1]])
    return values


def _with_sections(values: Values) -> Values:
    """The sections of rotary angles (for time, height and width) as wide together as the heads of
    a smaller model want them."""
    for part in (values, *values.values()):
        rotary = part.get("rope_parameters") if isinstance(part, dict) else None
        sections = rotary.get("mrope_section") if isinstance(rotary, dict) else None
        heads = part.get("num_attention_heads") if isinstance(part, dict) else None
        if not (isinstance(rotary, dict) and isinstance(sections, list) and heads):
            continue
        width = part.get("head_dim") or part.get("hidden_size", 0) // heads
        wanted = int(width * (rotary.get("partial_rotary_factor") or 1.0)) // 2
        if wanted and sum(sections) != wanted:
            scaled = [size * wanted // sum(sections) for size in sections]
            scaled[-1] += wanted - sum(scaled)
            rotary["mrope_section"] = scaled
    return values


class _Bounded(TorchDispatchMode):
    """Refuses tensors of more than so many bytes together: no model of full size is made."""

    MOST = 800_000_000

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "empty" in func.name() and args and isinstance(args[0], list | tuple):
            self.made += 4 * prod(size for size in args[0] if isinstance(size, int))
            if self.made > self.MOST:
                raise Underivable(
                    f"The class cannot be built without its numbers, more than {self.MOST} bytes."
                )
        return func(*args, **(kwargs or {}))


def plain_kernels(model: Any) -> None:
    """Experts one after another: grouped products want aligned rows and know few dtypes."""
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError, AttributeError):
            model.set_experts_implementation("eager")


def _auto_class(config: Any) -> Any:
    auto = class_of(config)
    if auto is None:
        raise Underivable(f"transformers has no model class for {config.model_type!r}.")
    return auto


def vocabulary_of(model: Any) -> int:
    """Tokens that a model knows; of one that reads none, numbers that noise is made by."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return 256


def token_ids(model: Any, seed: int = 0) -> torch.Tensor:
    """Token ids [2, 12] that a model is run on, special ones avoided."""
    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(seed)
    first = min(8, vocabulary // 2)
    return torch.randint(first, vocabulary, TOKENS, generator=generator)


def check_forward(model: Any) -> None:
    """Raise unless the model computes finite logits from its main input alone."""
    with torch.no_grad():
        logits = outputs(model, token_ids(model))
    if not torch.isfinite(logits).all():
        raise Underivable("The logits of a random model are not finite.")
