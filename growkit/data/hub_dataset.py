"""Rows of a Hugging Face dataset: of the Hub, of a local folder, or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growkit.core.errors import GrowkitError, UsageError, nearest, require_extra
from growkit.data.chat import conversation_text
from growkit.data.data_kinds import holds, remedy
from growkit.data.recipe import DatasetSection
from growkit.data.text_files import valid_text


def check_installed() -> None:
    """Raise UsageError when the ``datasets`` library is not there."""
    require_extra("datasets", "Hugging Face datasets", "data", "Reading a dataset")


def local_files(section: DatasetSection) -> list[Path]:
    """The files of a dataset that is a local folder, in the order of their paths."""
    folder = Path(section.path)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def commit_of(section: DatasetSection) -> str | None:
    """The commit of a Hub dataset that is read now; None for a local one or without a network."""
    if Path(section.path).exists():
        return None
    from huggingface_hub import HfApi

    try:
        commit: str | None = HfApi().dataset_info(section.path, revision=section.revision).sha
    except Exception:  # offline, private ...: load_dataset says what is wrong, or has a cache
        return None
    return commit


def read_rows(
    section: DatasetSection, text_field: str, commit: str | None, messages_field: str | None = None
) -> Iterator[str]:
    """The non-empty texts of a dataset, in its order; or its conversations, as JSON.

    Raises:
        UsageError: there is no such dataset, split or column.
        GrowkitError: reading stopped before the end (a row that is missing is never skipped).
    """
    rows = _load(section, commit)
    names = rows.column_names  # a stream of unknown columns says None
    field = messages_field or text_field
    if names is not None and field not in names:
        raise _no_column(section, field, list(names))
    if names is not None:
        more = [name for name in ("tools",) if messages_field and name in names]
        rows = rows.select_columns([field, *more])
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise GrowkitError(
                f"Reading the dataset {section.path!r} stopped: {_first_line(error)}.",
                "Nothing of it was kept; repeat the command.",
            ) from error
        if field not in row:
            raise _no_column(section, field, list(row))
        if messages_field is not None:
            where = f"A row of the dataset {section.path!r}"
            yield valid_text(conversation_text(row, messages_field, where))
            continue
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            raise UsageError(
                f"Column {text_field!r} of the dataset {section.path!r} holds {holds(text)}, not "
                "text.",
                f"{remedy(text, text_field, section.path)} Set data.text_field to the column that "
                "holds the text.".lstrip(),
            )
        if text and text.strip():
            yield valid_text(text)


def _load(section: DatasetSection, commit: str | None) -> Any:
    import datasets

    folder = Path(section.path)
    splits, saved = folder / "dataset_dict.json", folder / "state.json"
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        if splits.is_file() or saved.is_file():  # written by save_to_disk
            stored = datasets.load_from_disk(section.path)
            return stored[section.split] if splits.is_file() else stored
        return datasets.load_dataset(
            section.path,
            section.name,
            split=section.split,
            revision=commit or section.revision,
            streaming=section.streaming,
        )
    except Exception as error:
        raise UsageError(
            f"The dataset {section.path!r} cannot be loaded: {_first_line(error)}.",
            "Check data.dataset: path, name, split and revision, and the network connection.",
        ) from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _no_column(section: DatasetSection, text_field: str, names: list[str]) -> UsageError:
    return UsageError(
        f"The dataset {section.path!r} has no column {text_field!r}.",
        f"{nearest(text_field, names)}Set data.text_field; columns: {', '.join(names)}.",
    )
