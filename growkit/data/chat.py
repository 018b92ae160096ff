# SPDX-License-Identifier: Apache-2.0
"""Conversations as training documents: the model's chat template, and a loss on what it answers.

A document is a conversation: canonical JSON of its ``messages`` (and ``tools``), which is also what
it is known by where duplicates are looked for. It is rendered by the tokenizer's chat template. The
tokens that are targets are

* where the template marks them by ``{% generation %}``: what transformers'
  ``return_assistant_tokens_mask`` says;
* else, for each turn of the assistant, what it adds: the rendering up to and with the turn, less
  the rendering of what came before with ``add_generation_prompt=True``. The header of the turn is
  no target, what ends the turn is. A token is a target when its first character is.

A template under which one is no beginning of the other (some drop the reasoning of earlier turns)
is refused: it has no such difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from growkit.core.errors import UsageError, shown

CHAT_FORMAT = 1
# Of ShareGPT's {"from": ..., "value": ...}.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def conversation_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's conversation as canonical JSON: ``{"messages": [...], "tools": [...]}``.

    Keys whose value is null (parquet has every key in every message) are left out.

    Raises:
        UsageError: the field holds no messages, each with a role.
    """
    value = row.get(field)
    messages = [_message(m) for m in value] if isinstance(value, list | tuple) else []
    if not messages or not all(isinstance(m.get("role"), str) for m in messages):
        others = ", ".join(map(str, row)) or "none"
        raise UsageError(
            f"{where} has no messages in field {field!r}: it holds {shown(value)}.",
            "It has to be a list of objects with role and content. Set data.messages_field; the "
            f"fields there are: {others}.",
        )
    found: dict[str, Any] = {"messages": messages}
    tools = row.get("tools")
    if isinstance(tools, list | tuple) and tools:
        found["tools"] = _without_null(tools)
    return json.dumps(found, ensure_ascii=False, sort_keys=True)


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    if "role" not in value and isinstance(value.get("from"), str):
        role = str(value["from"])
        return {"role": _ROLES.get(role, role), "content": value.get("value") or ""}
    cleaned: dict[str, Any] = _without_null(value)
    return cleaned


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(v) for key, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list | tuple) else value


class ChatEncoder:
    """Conversations to tokens and targets, by a tokenizer's chat template.

    Raises:
        UsageError: the tokenizer has no template, or none of the fast kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UsageError(
                "The tokenizer has no chat template, and data.messages_field needs one.",
                "Set data.chat_template to a Jinja file, or take the tokenizer of a chat model.",
            )
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UsageError(
                f"The tokenizer ({type(tokenizer).__name__}) does not say which characters a token "
                "is of.",
                "data.messages_field needs a tokenizer with a tokenizer.json.",
            )
        self.tokenizer, self.template = tokenizer, template
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        # What ends a turn may be the end-of-text token: then none is added behind it.
        self.end: int | None = tokenizer.eos_token_id

    @property
    def key(self) -> list[Any]:
        """What decides the tokens of a conversation, besides the tokenizer's files."""
        return ["chat", CHAT_FORMAT, self.template]

    def encode(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids uint32, targets uint8) of each conversation, ended by the end-of-text token.

        Raises:
            UsageError: the template cannot render it, or not turn by turn.
        """
        for text in texts:
            values = json.loads(text)
            messages, options = values["messages"], {"tools": values.get("tools")}
            try:
                ids, targets = (
                    self._as_marked(messages, options)
                    if self.marked
                    else self._by_difference(messages, options)
                )
            except UsageError:
                raise
            except Exception as error:  # whatever a template raises: TemplateError, TypeError ...
                raise UsageError(
                    "The chat template cannot render the conversation that begins "
                    f"{shown(messages[0])}: {error}.",
                    "Change the conversation (the roles that the template knows, in its order), or "
                    "set data.chat_template.",
                ) from error
            yield self._ended(ids, targets)

    def _as_marked(
        self, messages: list[Any], options: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
            **options,
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _by_difference(
        self, messages: list[Any], options: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        def rendered(upto: int, prompt: bool = False) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=prompt, **options
            )
            return text

        whole = rendered(len(messages))
        is_target = np.zeros(len(whole) + 1, np.uint8)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = rendered(number, prompt=True) if number else ""
            after = rendered(number + 1)
            if not (after.startswith(before) and whole.startswith(after)):
                raise UsageError(
                    f"Under the chat template, message {number + 1} ({shown(message)}) does not "
                    "continue what stands before it, so its part of the text is not known.",
                    "Give a template that marks it by {% generation %} (data.chat_template), or "
                    "one conversation a turn.",
                )
            is_target[len(before) : len(after)] = 1
        encoded = self.tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
        return encoded["input_ids"], is_target[starts].tolist()

    def _ended(self, ids: list[int], targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
        if self.end is not None and not self._ends(ids):
            ids, targets = [*ids, self.end], [*targets, 0]
        return np.array(ids, np.uint32), np.array(targets, np.uint8)

    def _ends(self, ids: list[int]) -> bool:
        """Whether the end-of-text token is last, but for white space."""
        if self.end not in ids[-3:]:
            return False
        behind = ids[len(ids) - ids[::-1].index(self.end) :]
        return not behind or not self.tokenizer.decode(behind).strip()
