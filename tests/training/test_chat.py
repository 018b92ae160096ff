# SPDX-License-Identifier: Apache-2.0
"""Conversations: labels checked by hand, packing, the cache's key, a run that mixes them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import recipe_values, write_text

from growkit.core.errors import UsageError
from growkit.data.chat import ChatEncoder, conversation_text
from growkit.data.packing import IGNORED, datasets, pack
from growkit.data.recipe import DataSection
from growkit.data.sources import corpus_of
from growkit.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from growkit.training import Silent, train
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|endoftext|>\n{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|endoftext|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Takes the content of earlier turns away: what came before is no beginning of the whole.
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes é"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]
# By hand: what the loss is on, in order.
ANSWERS = ["yes é<|endoftext|>\n", "no<|endoftext|>\n"]
WHOLE = (
    "<user>one?<|endoftext|>\n<assistant>yes é<|endoftext|>\n"
    "<user>two?<|endoftext|>\n<assistant>no<|endoftext|>\n"
)


def tokenizer_folder(folder: Path, template: str = PLAIN) -> Path:
    train_bpe([], 257, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def write_rows(path: Path, count: int = 60) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, *TWO_TURNS[1:]]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(tokenizer: Any, ids: np.ndarray, targets: np.ndarray) -> list[str]:
    """The runs of targets, decoded."""
    edges = np.flatnonzero(np.diff(targets.astype(bool), prepend=False, append=False))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_targets_of_two_turns(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, template))
    text = conversation_text({"messages": TWO_TURNS}, "messages", "here")
    ((ids, targets),) = ChatEncoder(tokenizer).encode([text])
    assert tokenizer.decode(ids) == WHOLE  # ends by end-of-text and a line break: none is added
    assert answers(tokenizer, ids, targets) == ANSWERS
    # 257 tokens: one a byte, and the end of text
    assert targets.sum() == sum(len(a.replace("<|endoftext|>", "#").encode()) for a in ANSWERS)


def test_an_end_is_added_and_is_no_target(tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, bare))
    text = conversation_text({"messages": TWO_TURNS[:2]}, "messages", "here")
    ((ids, targets),) = ChatEncoder(tokenizer).encode([text])
    assert tokenizer.decode(ids) == "one?\nyes é\n<|endoftext|>"
    assert answers(tokenizer, ids, targets) == ["yes é\n"]


def test_what_has_no_difference_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, FORGETFUL))
    text = conversation_text({"messages": TWO_TURNS}, "messages", "here")
    with pytest.raises(UsageError, match=r"message 2 .* does not continue what stands before"):
        list(ChatEncoder(tokenizer).encode([text]))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"cannot render .*roles must alternate"):
        list(ChatEncoder(tokenizer).encode([text]))
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        ChatEncoder(tokenizer)


def test_rows_of_other_shapes() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert json.loads(conversation_text(row, "conversations", "here")) == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    row = {"messages": [{"role": "user", "content": "a", "name": None}], "tools": [{"x": None}]}
    expected = {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}
    assert json.loads(conversation_text(row, "messages", "here")) == expected
    for value in ("text", [], [{"content": "a"}], ["a"], None):
        with pytest.raises(UsageError, match="here has no messages in field 'messages'"):
            conversation_text({"messages": value}, "messages", "here")


@pytest.mark.parametrize("attention", ["joined", "separate"])
def test_packing_keeps_the_targets_and_parquet_equals_jsonl(tmp_path: Path, attention: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tokenizer_folder(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    rows = write_rows(tmp_path / "chat.jsonl")
    table = pyarrow.Table.from_pylist([json.loads(line) for line in rows.read_text().splitlines()])
    parquet.write_table(table, tmp_path / "chat.parquet")
    found = []
    for file in (rows, tmp_path / "chat.parquet"):
        section = DataSection(
            files=[file],
            messages_field="messages",
            sequence_length=32,
            document_attention=attention,
        )
        packed = pack(
            corpus_of(section), tokenizer, tokenizer_fingerprint(folder), tmp_path / "cache",
            Silent(), workers=1,
        )  # fmt: skip
        train_set, held_out = datasets(packed, section)
        assert held_out is not None and held_out.bytes_per_token is None
        labels = [held_out[i]["labels"][1:] for i in range(len(held_out))]
        counted = sum(int((row != IGNORED).sum()) for row in labels)
        assert held_out.predicted_tokens == counted > 0
        items = [train_set[i] for i in range(len(train_set))]
        found.append([(i["input_ids"].tolist(), i["labels"].tolist()) for i in items])
    assert found[0] == found[1]
    # All sequences in order are the conversations in order, and the labels are their answers.
    ids = np.array([token for row, _ in found[0] for token in row])
    labels = np.array([token for _, row in found[0] for token in row])
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()
    said = answers(tokenizer, ids, labels != IGNORED)
    if attention == "joined":  # else what begins a sequence is no target, in an answer too
        assert set(said[:-1]) == set(ANSWERS) and len(said) > 50


def test_the_template_is_in_the_key_of_the_cache(tmp_path: Path) -> None:
    section = DataSection(files=[write_rows(tmp_path / "a.jsonl")], messages_field="messages")
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    for template, shards in ((PLAIN, 1), (MARKED, 2), (PLAIN, 2)):
        tokenizer.chat_template = template
        pack(corpus_of(section), tokenizer, "same", tmp_path / "cache", Silent(), workers=1)
        assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == shards


def test_a_run_mixes_conversations_with_text(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, max_steps=4, decay_steps=1, eval_steps=2)
    values["tokenizer"] = {"path": str(tokenizer_folder(tmp_path / "tokenizer", FORGETFUL))}
    text = write_text(tmp_path / "king.txt")
    template = tmp_path / "other.jinja"
    template.write_text(PLAIN)
    values["data"] = {
        "mixture": [
            {"name": "replay", "files": [str(text)], "weight": 0.25},
            {"name": "chat", "files": [str(write_rows(tmp_path / "a.jsonl", 200))],
             "messages_field": "messages", "weight": 0.75},
        ],
        "chat_template": str(template),
        "sequence_length": 16,
    }  # fmt: skip
    train(make_recipe(values), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "training" / "metrics.jsonl")
    last = [row for row in rows if "eval_loss" in row][-1]
    assert {"eval_loss/replay", "eval_loss/chat"} <= last.keys() and "bits_per_byte" not in last
    # The template goes along with the model.
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == PLAIN
    record = json.loads((tmp_path / "run" / "growkit_training.json").read_text())
    assert record["data"]["chat"]["tokens"] == 3 * record["data"]["replay"]["tokens"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": ["a.bin"], "messages_field": "m"}, "'tokens' hold none"),
        ({"files": ["a.jsonl"], "chat_template": "x.jinja"}, "no effect without"),
        ({"files": "sample", "messages_field": "m"}, "'files: sample' holds none"),
    ],
)
def test_recipes_that_cannot_be(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DataSection.model_validate(change)


def test_a_text_file_holds_no_conversations(tmp_path: Path) -> None:
    text = write_text(tmp_path / "king.txt")
    section = DataSection(files=[text], messages_field="messages")
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    with pytest.raises(UsageError, match=r"is plain text, and data\.messages_field asks"):
        pack(corpus_of(section), tokenizer, "same", tmp_path / "cache", Silent(), workers=1)
