"""Token ids in config.json and generation_config.json, moved to where the tokens stand now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.core.json_files import parse_json_object
from growkit.vocabulary.embedding_rows import NEW, VocabularyRows
from growkit.vocabulary.tokens import Tokens

_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def moved_ids(config: Mapping[str, Any], rows: VocabularyRows) -> tuple[dict[str, Any], list[str]]:
    """The fields of a config that name tokens, with the tokens' new ids.

    Args:
        config: the content of config.json or generation_config.json; sections are looked into.

    Returns:
        The whole config, and the dotted names of the fields whose token is gone (left as null; in
        a list the id is left out).
    """
    lost: list[str] = []

    def place(old: int, name: str) -> int | None:
        new = int(rows.place[old]) if 0 <= old < rows.old_size else old
        if new == NEW:
            lost.append(name)
            return None
        return new

    def moved(value: Any, name: str) -> Any:
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return place(value, name)
        if isinstance(value, list):
            return [new for entry in value if (new := moved(entry, name)) is not None]
        return value

    def section(content: Mapping[str, Any], above: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in content.items():
            name = f"{above}{key}"
            if isinstance(value, Mapping):
                result[key] = section(value, f"{name}.")
            elif key in _LISTS or key.endswith(_ENDINGS):
                result[key] = moved(value, name)
            else:
                result[key] = value
        return result

    return section(config, ""), lost


def special_ids(
    config: Mapping[str, Any], lost: list[str], files: Mapping[str, bytes], new: Tokens
) -> tuple[dict[str, Any], list[str]]:
    """A config whose tokens are gone, with the new tokenizer's tokens of the same role.

    Args:
        config: from :func:`moved_ids`.
        lost: its fields without a token.
        files: of the new tokenizer; its tokenizer_config.json says ``eos_token`` and others.

    Returns:
        The config, and a sentence for every field that changed its token or lost it.
    """
    stated: dict[str, Any] = {}
    file = "tokenizer_config.json"
    if file in files:
        stated = parse_json_object(files[file], file, non_finite=True)
    result, notes = dict(config), []
    for name in dict.fromkeys(lost):
        role = stated.get(name.removesuffix("_id"))
        token = role.get("content") if isinstance(role, dict) else role
        if isinstance(token, str) and token in new.ids and name in result:
            result[name] = new.ids[token]
            notes.append(f"{name}: its old token is gone, it is {token!r} of the new tokenizer")
        else:
            notes.append(f"{name}: its token is not in the new tokenizer, so it names none")
    return result, notes
