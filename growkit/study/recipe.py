"""The study recipe: what a YAML file may say, checked before anything else happens. No torch.

A study is one budget of training FLOPs and several *arms*, each a way to spend it. An arm (and a
*base*, which several arms continue from) says what it starts from and what differs in its training.
docs/running-studies.md explains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from growkit.core.errors import UsageError, nearest
from growkit.data.recipe import DataSection
from growkit.recipe.section import Positive, Section
from growkit.surgery.request import GrowthRequest
from growkit.training.recipe import TokenizerSection
from growkit.variants.request import ConversionRequest

Above0 = Annotated[float, Field(gt=0)]
# See growkit.training.growth.probes.
Series = Literal[
    "update_norm_old",
    "update_norm_new",
    "head_similarity",
    "unit_similarity",
    "dead_new_heads",
    "new_heads",
    "lambda",
    "signal_entropy",
    "noise_entropy",
]
Share = Annotated[float, Field(gt=0, le=1)]


class Budget(Section):
    """Training FLOPs of every arm: a number, or what ``tokens`` tokens cost the arm ``arm``.

    Attributes:
        training_flops: of every arm, what its base spent counted in.
        tokens: in place of it, with ``arm``.
        arm: whose cost for so many tokens is the budget of all.
    """

    training_flops: Above0 | None = None
    tokens: Positive | None = None
    arm: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Budget:
        if (self.training_flops is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'training_flops' and 'tokens'")
        if (self.tokens is None) != (self.arm is None):
            raise ValueError("'tokens' and 'arm' go together: so many tokens of that arm")
        return self


class SweepSection(Section):
    """How a learning rate that is given as a list is chosen: by short trials of one seed.

    Attributes:
        share: part of an arm's steps that a trial runs, with a decay of its own.
        seed: random seed of the trials.
    """

    share: Share = 0.3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class RaceSection(Section):
    """How ``growkit study --race`` puts arms out, by short runs of one seed.

    Attributes:
        shares: parts of an arm's steps that the short runs take, rising; after each the better half
            goes on.
        survivors: how many run to the budget, at least.
    """

    shares: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0.1, 0.3]
    )
    survivors: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _rising(self) -> RaceSection:
        if self.shares != sorted(set(self.shares)):
            raise ValueError(f"'shares' are {self.shares}: each has to be larger than the last")
        return self


class Start(Section):
    """Where a model comes from, what is done to it, and what differs in its training.

    Attributes:
        label: name in tables and figures; absent: the key of the recipe.
        config: from scratch, as in a training recipe.
        checkpoint: an existing folder; what its training cost is not known and not counted.
        base: continues from a base of the recipe.
        shape_of: from scratch, in the final shape of another arm.
        grow: as in a growth recipe; without it a base is trained on as it is.
        convert: as the options of ``growkit convert``.
        training: changes to the training section; ``learning_rate`` may be a list, or
            ``{of: NAME}`` for the rate that another base or arm uses.
        optimizer_state: ``reset`` continues from a base with a fresh optimizer (a conversion always
            does; of a growth, ``grow.optimizer_state`` says it).
        rewarm_steps: the learning rate rises from 0 again over so many steps after the change.
        attn_implementation: as in a training recipe's model section.
        dtype: as in a training recipe's model section.
        training_flops: of an arm, its own budget in place of the study's: arms from scratch with
            several make the curve that savings are read from. Of a base, what it may spend; that
            or ``tokens``.
    """

    label: str | None = None
    config: dict[str, Any] | None = None
    checkpoint: Path | None = None
    base: str | None = None
    shape_of: str | None = None
    grow: dict[str, Any] | None = None
    convert: dict[str, Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    optimizer_state: Literal["auto", "reset"] = "auto"
    rewarm_steps: Annotated[int, Field(ge=0)] = 0
    attn_implementation: str | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    training_flops: Above0 | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Start:
        origins = (self.config, self.checkpoint, self.base, self.shape_of)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of 'config', 'checkpoint', 'base' and 'shape_of'")
        if self.grow is not None and self.convert is not None:
            raise ValueError("'grow' and 'convert' are two changes: put the first into a base")
        changed = self.grow is not None or self.convert is not None
        if changed and self.base is None and self.checkpoint is None:
            raise ValueError("'grow' and 'convert' need a 'base' or a 'checkpoint' to change")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' needs a model_type, for example gda or llama")
        if self.rewarm_steps and self.base is None:
            raise ValueError("'rewarm_steps' follows a 'base'; a first warm-up is warmup_steps")
        return self

    @property
    def from_scratch(self) -> bool:
        """Begins with random weights."""
        return self.config is not None or self.shape_of is not None

    @property
    def change(self) -> dict[str, Any] | None:
        """What is done to the model, as a content key and a record hold it."""
        if self.grow is not None:
            return {"grow": GrowthRequest.from_mapping(self.grow).to_dict()}
        if self.convert is not None:
            return {"convert": self.conversion().to_dict()}
        return None

    def conversion(self) -> ConversionRequest:
        """The conversion. Raises UsageError for a wrong value."""
        assert self.convert is not None
        known = ConversionRequest.__dataclass_fields__
        for key in self.convert:
            if key not in known:
                raise UsageError(
                    f"The recipe has an unknown key {key!r} under 'convert'.",
                    f"{nearest(str(key), known)}Valid keys: {', '.join(known)}.",
                )
        if "to" not in self.convert:
            raise UsageError(
                "The recipe has a 'convert' without 'to'.", "For example convert: {to: diff_v2}."
            )
        return ConversionRequest(**self.convert)


class Base(Start):
    """A model that several arms continue from; every seed has its own.

    Attributes:
        tokens: what it reads; this or ``training_flops``.
    """

    tokens: Positive | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Base:
        if (self.training_flops is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'training_flops' and 'tokens'")
        return self


class Question(Section):
    """Two arms whose final losses are compared.

    Attributes:
        arm: the one that is spoken of.
        against: the other one.
    """

    arm: str
    against: str


class StudyRecipe(Section):
    """A whole study.

    Attributes:
        question: what the study asks.
        description: more about it.
        seeds: random seeds of initialization and data order; every arm runs with each.
        data: as in a training recipe; something has to be held out.
        tokenizer: as in a training recipe; absent where all models are checkpoints with their own.
        training: as in a training recipe, for all runs; ``schedule`` is ``wsd`` by default.
            Lengths, seed and intervals are the study's.
        budget: training FLOPs of every arm.
        bases: models that several arms continue from, by name.
        arms: what is compared, by name.
        compare: pairs of arms; absent: every arm against from-scratch in its shape and the first.
        sweep: how a learning rate is chosen from a list.
        race: how arms are put out with ``--race``; absent: after 0.1 and 0.3 of the steps.
        evaluations: held-out evaluations over the budget.
        target_loss: whose FLOPs are compared; absent: the final loss from scratch.
        measures: ``[attention]``: the attention suite on every final model.
        series: probes over the last phase, for example ``[head_similarity]``.
    """

    question: str
    description: str | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    data: DataSection
    tokenizer: TokenizerSection | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    budget: Budget
    bases: dict[str, Base] = Field(default_factory=dict)
    arms: Annotated[dict[str, Start], Field(min_length=1)]
    compare: list[Question] = Field(default_factory=list)
    sweep: SweepSection = Field(default_factory=SweepSection)
    race: RaceSection | None = None
    evaluations: Positive = 20
    target_loss: Above0 | None = None
    measures: list[Literal["attention"]] = Field(default_factory=list)
    series: list[Series] = Field(default_factory=list)

    def start(self, name: str) -> Start:
        """A base or an arm by its name; the names of both are different."""
        return self.bases[name] if name in self.bases else self.arms[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML file would hold them."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)
