"""The recipes that come with growkit, found by name in a clone and after an install."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, nearest

# growkit/recipes is a link to recipes/ in a clone, and a folder of copies in an installed package.
_PLACES = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")

KINDS = ("grow", "train", "study")
# What only a recipe of the kind has.
KEYS = {"study": "arms", "grow": "grow"}


@dataclass(frozen=True)
class RecipeFile:
    """One shipped recipe.

    Attributes:
        name: what ``--recipe``, ``growkit train`` and ``growkit study`` take.
        kind: ``grow``, ``train`` or ``study``.
        description: what it does.
        source: paper or model that it follows, if any.
        purpose: what it is for.
        command: the command that runs it.
        path: the file.
    """

    name: str
    kind: str
    description: str
    source: str
    purpose: str
    command: str
    path: Path

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def recipe_folder() -> Path:
    """The folder of the shipped recipes."""
    return next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def shipped_recipes() -> list[RecipeFile]:
    """Every shipped recipe: growth, then training, then studies, by name."""
    found = [_read(path) for path in sorted(recipe_folder().glob("*.yaml"))]
    return sorted(found, key=lambda recipe: (KINDS.index(recipe.kind), recipe.name))


def find_recipe(given: Path) -> Path:
    """The file of ``--recipe``: a file that exists, or a shipped recipe by its name.

    Raises:
        UsageError: neither; the shipped names are listed.
    """
    if given.exists():
        return given
    names = [path.stem for path in sorted(recipe_folder().glob("*.yaml"))]
    if str(given) in names:
        return recipe_folder() / f"{given}.yaml"
    raise UsageError(
        f"There is no recipe {str(given)!r}.",
        f"{nearest(given.stem, names)}Give a YAML file, or the name of one that comes with "
        f"growkit: {', '.join(names)}.",
    )


def save(path: Path, grow: dict[str, Any], source: str, revision: str | None = None) -> None:
    """Write a ``grow`` section to a new file, under the command that runs it.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    import shlex

    import yaml

    command = [
        "growkit",
        "grow",
        source,
        "--recipe",
        str(path),
        "--out",
        f"{Path(source).name}-grown",
    ]
    if revision is not None:
        command += ["--revision", revision]
    line = shlex.join(command).replace("\n", " ")
    text = f"# {line}\n" + yaml.safe_dump({"grow": grow}, sort_keys=False)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(
            f"--save-recipe {str(path)!r} exists already.", "Give the name of a new file."
        ) from None
    except OSError as error:
        raise UsageError(
            f"--save-recipe {str(path)!r} cannot be written: {error.strerror}.",
            "Give a file in a folder that exists.",
        ) from None


def _read(path: Path) -> RecipeFile:
    """Keys of the file; where a training recipe has none, its first comment."""
    import yaml

    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    commands = [line for line in comment if line.startswith("growkit ")]
    said = " ".join(line for line in comment if line and line not in commands)
    return RecipeFile(
        name=path.stem,
        kind=next((kind for kind, key in KEYS.items() if key in content), "train"),
        description=" ".join(str(content.get("description", said)).split()),
        source=" ".join(str(content.get("source", "")).split()),
        purpose=" ".join(str(content.get("purpose", content.get("question", ""))).split()),
        command=commands[0] if commands else "",
        path=path,
    )
