"""A study recipe from a YAML file: read, overridden, checked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from growkit.core.errors import UsageError, nearest
from growkit.recipe.section import by_override, nearest_key, validated
from growkit.study.recipe import Start, StudyRecipe
from growkit.surgery.request import GrowthRequest
from growkit.training.read_recipe import read_values
from growkit.training.recipe_training import TrainingSection

# The study sets these: the budget gives the steps, and the seed is one of the study's.
OWN = (
    "max_steps",
    "max_tokens",
    "seed",
    "logging_steps",
    "eval_steps",
    "probe_steps",
    "save_steps",
    "save_total_limit",
)
# A base and what continues from it read one order of samples.
SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps")


def make_study(
    values: Any, source: str = "study", text: str = "", overrides: Sequence[str] = ()
) -> StudyRecipe:
    """Check a mapping; arguments as of :func:`growkit.training.read_recipe.make_recipe`.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    study = validated(StudyRecipe, values, source, text, overrides)
    check_data(study, source)
    check_training(study, source, overrides)
    check_references(study, source)
    return study


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a YAML recipe and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        UsageError: the file cannot be read, is not YAML, or says something that no study can.
    """
    values, text = read_values(path, overrides)
    return make_study(values, str(path), text, overrides)


def check_references(study: StudyRecipe, source: str) -> None:
    """Every name that a section mentions exists, and nothing continues from itself.

    Raises:
        UsageError: naming the section.
    """
    both = study.bases.keys() & study.arms.keys()
    if both:
        raise UsageError(
            f"{source}: {min(both)!r} is the name of a base and of an arm.", "Rename one of them."
        )
    for name, start in {**study.bases, **study.arms}.items():
        where = f"{source}: {_kind(study, name)}.{name}"
        if start.base is not None:
            _known(start.base, study.bases, f"{where}.base", "bases")
        if start.shape_of is not None:
            _known(start.shape_of, study.arms, f"{where}.shape_of", "arms")
        of = _rate_of(study, start)
        if of is not None:
            _known(of, {**study.bases, **study.arms}, f"{where}.training.learning_rate.of", "names")
        _no_circle(study, name, where)
        _check_change(start, where)
    for number, question in enumerate(study.compare):
        for key in ("arm", "against"):
            _known(getattr(question, key), study.arms, f"{source}: compare[{number}].{key}", "arms")
    if study.budget.arm is not None:
        _known(study.budget.arm, study.arms, f"{source}: budget.arm", "arms")
    if study.tokenizer is None and any(
        start.from_scratch for start in {**study.bases, **study.arms}.values()
    ):
        raise UsageError(
            f"{source}: a model from scratch needs a 'tokenizer' section.",
            "For example tokenizer: {train_bpe: 1024}.",
        )
    if len(set(study.seeds)) != len(study.seeds):
        raise UsageError(f"{source}: a seed stands twice in seeds.", "Give every seed once.")


def _kind(study: StudyRecipe, name: str) -> str:
    return "bases" if name in study.bases else "arms"


def _rate_of(study: StudyRecipe, start: Start) -> str | None:
    """Whose learning rate it uses; the study's own training section may say so for all."""
    rate = {**study.training, **start.training}.get("learning_rate")
    return str(rate["of"]) if isinstance(rate, dict) and "of" in rate else None


def _check_change(start: Start, where: str) -> None:
    """Read the growth or conversion now, so that a wrong one is refused now."""
    try:
        if start.grow is not None:
            GrowthRequest.from_mapping(start.grow).operators()
        if start.convert is not None:
            start.conversion().conversion()
    except UsageError as error:
        raise UsageError(f"{where}: {error.cause}", error.remedy) from None


def check_data(study: StudyRecipe, source: str) -> None:
    """There is a held-out loss, and runs of every length read the same samples.

    Raises:
        UsageError: naming the key.
    """
    if study.data.eval_fraction == 0 and not study.data.holds_out_files:
        raise UsageError(
            f"{source}: data.eval_fraction is 0 and there are no data.eval_files.",
            "Arms are compared by their held-out loss: hold out a part, for example 0.02.",
        )
    if study.data.holds_tokens and study.measures:
        raise UsageError(
            f"{source}: measures needs held-out text, and data names token files.",
            "Give text in data.files, or leave measures out.",
        )
    for part in study.data.mixture or ():
        if part.weights[0] != part.weights[1]:
            raise UsageError(
                f"{source}: data.mixture gives {part.name!r} a weight that changes over the run.",
                "Arms have runs of different lengths and would read different text: give numbers.",
            )


def _known(name: str, names: Any, where: str, what: str) -> None:
    if name not in names:
        raise UsageError(
            f"{where} is {name!r}, which the recipe does not define.",
            f"{nearest(name, names)}Valid {what}: {', '.join(names) or 'none'}.",
        )


def _no_circle(study: StudyRecipe, name: str, where: str) -> None:
    """By any mixture of base and shape_of, or of base and the learning rate of another.

    A shape needs no learning rate, so those two do not mix.
    """

    def follow(
        name: str, path: tuple[str, ...], links: Callable[[Start], list[str | None]]
    ) -> None:
        if name in path:
            raise UsageError(
                f"{where} continues from itself: {' -> '.join((*path, name))}.",
                "Let one of them start from a config, or give its learning rate.",
            )
        for other in links(study.start(name)):
            if other is not None and (other in study.bases or other in study.arms):
                follow(other, (*path, name), links)

    follow(name, (), lambda start: [start.base, start.shape_of])
    follow(name, (), lambda start: [start.base, _rate_of(study, start)])


def check_training(study: StudyRecipe, source: str, overrides: Sequence[str] = ()) -> None:
    """Every training section is one that a run can have.

    Raises:
        UsageError: naming the key and valid ones.
    """
    sections = {"training": study.training}
    for name, start in {**study.bases, **study.arms}.items():
        sections[f"{_kind(study, name)}.{name}.training"] = start.training
    valid = [name for name in TrainingSection.model_fields if name not in OWN]
    for where, section in sections.items():
        for key in section:
            if key not in valid:
                why = "is set by the study itself" if key in OWN else "is not known"
                place = by_override((*where.split("."), key), overrides) or source
                raise UsageError(
                    f"{place}: {where} has {key!r}, which {why}.",
                    f"{nearest_key(str(key), valid)}Valid keys: {', '.join(valid)}.",
                )
            if key in SHARED and where != "training":
                raise UsageError(
                    f"{source}: {where} has {key!r}, which all arms share.",
                    "Set it in the study's own training section.",
                )
        _check_values({**study.training, **section}, f"{source}: {where}")
    for name, start in {**study.bases, **study.arms}.items():
        schedule = {**study.training, **start.training}.get("schedule", "wsd")
        if start.base is not None and schedule not in ("wsd", "constant"):
            raise UsageError(
                f"{source}: {_kind(study, name)}.{name} continues from a base with schedule "
                f"{schedule!r}.",
                "Use wsd or constant, whose course does not depend on what came before.",
            )


def _check_values(values: dict[str, Any], where: str) -> None:
    rate = values.get("learning_rate")
    if isinstance(rate, dict):
        if set(rate) != {"of"} or not isinstance(rate["of"], str):
            raise UsageError(
                f"{where}.learning_rate is {rate!r}.",
                "Give a number, a list of numbers, or {of: NAME}.",
            )
        rates = []
    else:
        rates = rate if isinstance(rate, list) else [] if rate is None else [rate]
        if rate == []:
            raise UsageError(f"{where}.learning_rate is [].", "Give at least one rate.")
    for one in rates or [1e-3]:
        try:
            TrainingSection.model_validate({**values, "learning_rate": one, "max_steps": 1})
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"{where}{'.' + key if key else ''} is {problem['input']!r}.",
                f"{problem['msg'].removeprefix('Value error, ')}.",
            ) from None
    if len({float(one) for one in rates}) != len(rates):
        raise UsageError(f"{where}.learning_rate is {rate!r}.", "Give different rates.")
