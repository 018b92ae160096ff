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
KEYS = {"study": {"arms", "budget", "compare"}, "grow": {"grow"}, "train": {"training"}}


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


def recipe_names(kind: str | None = None) -> list[str]:
    """Names of the shipped recipes, of one kind or of all."""
    paths = sorted(recipe_folder().glob("*.yaml"))
    return [path.stem for path in paths if kind is None or kind == _kind_of(_content(path))]


def find_recipe(given: Path, kind: str | None = None) -> Path:
    """The file of ``--recipe``: a file that exists, or a shipped recipe by its name.

    Args:
        kind: ``grow``, ``train`` or ``study``: what the command can run.

    Raises:
        UsageError: neither, and the shipped names are listed; or it is of another kind, and the
            command that runs it is named.
    """
    names = recipe_names()
    path = given
    if not given.exists() and str(given) in names:
        path = recipe_folder() / f"{given}.yaml"
    if path.exists():
        if kind is not None:
            _check_kind(given, path, kind)
        return path
    raise UsageError(
        f"There is no recipe {str(given)!r}.",
        f"{nearest(given.stem, names)}Give a YAML file, or the name of one that comes with "
        f"growkit: {', '.join(names)}.",
    )


# How each kind is run.
COMMANDS = {
    "grow": "growkit grow CKPT --recipe {} --out GROWN",
    "train": "growkit train {} --out RUN",
    "study": "growkit study {} --out STUDY",
}


def _check_kind(given: Path, path: Path, kind: str) -> None:
    content = _content(path)
    found = _kind_of(content)
    if found not in (None, kind):
        import shlex

        raise UsageError(
            f"{str(given)!r} is a {found} recipe, not a {kind} recipe.",
            f"Run it with: {COMMANDS[str(found)].format(shlex.quote(str(given)))}",
        )


def _content(path: Path) -> Any:
    """What a YAML file holds; None where it cannot be read, which its reader explains."""
    from growkit.core.errors import GrowkitError
    from growkit.core.files import read_text
    from growkit.core.yaml_files import MAX_YAML_BYTES, IncrementLoader, parse_yaml

    try:
        return parse_yaml(read_text(path, limit=MAX_YAML_BYTES), str(path), IncrementLoader)
    except GrowkitError:
        return None


def _kind_of(content: Any) -> str | None:
    """The kind of a recipe; None where its keys do not tell."""
    if not isinstance(content, dict):
        return None
    return next((kind for kind, keys in KEYS.items() if keys & content.keys()), None)


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
        kind=_kind_of(content) or "train",
        description=" ".join(str(content.get("description", said)).split()),
        source=" ".join(str(content.get("source", "")).split()),
        purpose=" ".join(str(content.get("purpose", content.get("question", ""))).split()),
        command=commands[0] if commands else "",
        path=path,
    )
