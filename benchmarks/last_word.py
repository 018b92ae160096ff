"""Tasks of lm-evaluation-harness from any text: guess the last word of a passage.

    python benchmarks/last_word.py held_out.txt other.txt --out tasks
    growkit eval CKPT --include-path tasks --tasks last_word_held_out,last_word_choice_held_out

In the manner of LAMBADA (arXiv:1606.06031): a passage of some sentences whose last word stood in
the passage before, though not in its last sentence, so that who has read the passage can guess it
and who has read the last sentence alone hardly can. No person has filtered them: compare models
with each other, not with published LAMBADA figures. Two tasks a text:

* ``last_word_NAME``: the word is generated (accuracy, perplexity of the word);
* ``last_word_choice_NAME``: the word against three other words of the passage; chance is 25 %. For
  models too small to guess whole words.

Nothing is fetched; the same text gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# After its full stop, and a closing quote or bracket where there is one.
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\u201d\u2019]))\s+")
# Shorter words are mostly articles, pronouns and prepositions, which grammar alone foretells.
LEAST_LETTERS = 4
CHOICES = 4
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "metadata": {"version": 1.0},
}
GENERATED = {
    "output_type": "loglikelihood",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def passages(text: str, *, words: int = 60) -> Iterator[dict[str, Any]]:
    """Rows ``context``, ``word``, ``choices`` and ``label``; no two share a sentence.

    Args:
        words: least words of a context.
    """
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences += SENTENCE_END.split(" ".join(paragraph.split()))
    first = 0
    for last, sentence in enumerate(sentences):
        before = " ".join(sentences[first:last])
        if len(before.split()) < words:
            continue
        row = _row(before, sentence, random.Random(f"{last} {sentence}"))
        if row is not None:
            yield row
            first = last + 1
        else:  # the passage moves on, so that contexts stay of one size
            first += 1


def _row(before: str, sentence: str, generator: random.Random) -> dict[str, Any] | None:
    found = list(WORD.finditer(sentence))
    if len(found) < 3:
        return None
    word, start = found[-1].group(), found[-1].start()
    context = sentence[:start]
    # The word has to follow a space: a tokenizer sees another word after a hyphen or a quote.
    if len(word) < LEAST_LETTERS or not context.endswith(" "):
        return None
    seen = {other.lower(): other for other in WORD.findall(before)}
    in_sentence = {other.group().lower() for other in found[:-1]}
    if word.lower() not in seen or word.lower() in in_sentence:
        return None
    others = sorted(
        other
        for lower, other in seen.items()
        if len(other) >= LEAST_LETTERS
        and lower != word.lower()
        and other[0].isupper() == word[0].isupper()
    )
    if len(others) < CHOICES - 1:
        return None
    choices = [*generator.sample(others, CHOICES - 1), word]
    generator.shuffle(choices)
    return {
        "context": f"{before} {context.rstrip()}",
        "word": word,
        "choices": choices,
        "label": choices.index(word),
    }


def spread(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` rows, evenly over the text."""
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def write_tasks(name: str, rows: list[dict[str, Any]], out: Path) -> list[str]:
    """Write a jsonl and two YAML files; returns the tasks' names."""
    import yaml

    out.mkdir(parents=True, exist_ok=True)
    data = (out / f"last_word_{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    tasks = {f"last_word_{name}": GENERATED, f"last_word_choice_{name}": CHOSEN}
    for task, fields in tasks.items():
        text = yaml.safe_dump({"task": task} | COMMON | files | fields, sort_keys=False)
        (out / f"{task}.yaml").write_text(text)
    return list(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", nargs="*", type=Path, help="default: growkit's built-in sample")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--limit", type=int, default=300, help="passages a text, evenly over it")
    parser.add_argument("--words", type=int, default=60, help="least words of a context")
    options = parser.parse_args()
    texts = {path.stem: path.read_text(encoding="utf-8") for path in options.texts}
    if not texts:
        from growkit.samples import sample_text

        texts = {"sample": sample_text()}
    tasks = []
    for stem, text in texts.items():
        rows = list(passages(text, words=options.words))
        if not rows:
            parser.error(f"{stem!r} has no passage that ends on a word seen before")
        name = re.sub(r"\W+", "_", stem).strip("_").lower()
        kept = spread(rows, options.limit)
        tasks += write_tasks(name, kept, options.out)
        print(f"{stem}: {len(kept)} of {len(rows)} passages")
    print(f"growkit eval CKPT --include-path {options.out} --tasks {','.join(tasks)}")


if __name__ == "__main__":
    main()
