# SPDX-License-Identifier: Apache-2.0
"""The JSON reader: what is refused, and that refusing costs neither time nor memory."""

import json
import math
import random

import pytest

from growkit.core import json_files
from growkit.core.errors import CheckpointError, UsageError
from growkit.core.json_files import parse_json, parse_json_object, read_json, read_json_object

HOSTILE = {
    "depth": (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 100 levels"),
    "depth of objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 100"),
    "values": (b"[" + b"[]," * 5_000_000 + b"[]]", "more than 2000000 values"),
    "quotes without end": (b'["' + rb"\"" * 3_000_000 + b"[" * 200, "not valid JSON"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    "key twice": (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
    "lone surrogate": (rb'{"a": "\udc80"}', r"'\\udc80' has half of a surrogate pair"),
    "lone surrogate in a key": (rb'{"\ud800": 1}', "has half of a surrogate pair"),
    "NaN": (b"[NaN]", "NaN is not a JSON number"),
    "Infinity": (b"[-Infinity]", "-Infinity is not a JSON number"),
    "infinite float": (b"[1e999]", "the number 1e999 is too large"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "nothing": (b"", "not valid JSON"),
    "text after the end": (b"{} {}", "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_with_a_sentence(case):
    content, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=r"'some\.json' is not valid JSON: ") as caught:
        parse_json(content, "some.json")
    assert caught.match(message)
    assert len(str(caught.value)) < 300


def test_brackets_in_strings_are_not_depth():
    value = {
        "a": "[{" * 200,
        'b"[': ['\\"[', "\\", "]" * 300],
        "😀": "é\N{GRINNING FACE}",
    }
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


def test_depth_is_that_of_the_value():
    """Against the depth that a recursive count finds, on random values with strings of brackets."""
    rng = random.Random(3)

    def build(depth):
        if depth == 0:
            return "".join(rng.choice('[]{}",\\a') for _ in range(rng.randrange(6)))
        inner = build(depth - 1)
        others = [build(0) for _ in range(rng.randrange(3))]
        return [inner, *others] if rng.random() < 0.5 else {"k]": inner, "[o": others[:1]}

    for _ in range(50):
        limit = json_files.MAX_DEPTH
        parse_json(json.dumps(build(limit - 1)).encode(), "x")
        with pytest.raises(CheckpointError, match="nested deeper"):
            parse_json(json.dumps(build(limit + 1)).encode(), "x")


def test_non_finite_numbers_where_they_are_expected():
    value = parse_json(b"[NaN, Infinity, 1e999]", "x", non_finite=True)
    assert math.isnan(value[0]) and value[1:] == [math.inf, math.inf]


def test_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, true]}')
    assert read_json(path) == read_json_object(path) == {"a": [1, 2.5, None, True]}
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(UsageError, match="not a JSON object"):
        read_json_object(path, error=UsageError)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        parse_json_object(b"3", "x")
    with pytest.raises(CheckpointError, match="larger than 2 bytes"):
        read_json(path, limit=2)
