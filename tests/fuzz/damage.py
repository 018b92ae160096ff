# SPDX-License-Identifier: Apache-2.0
"""Seeded damage: bytes, JSON and YAML values, headers, and what stands in for files."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1e30, -0.5, 0.5, 2.0, 1e-300, float("nan"), float("inf"),
    10**6, 4_000_000, 24_000_000, 10**9, 2**31, 2**62, 2**63, 10**30, 10**99, "", "x", "8", "x2",
    "+8", "-1", "\x00", "\x1b[2J", "[/x]", "\ud800", "\u202e", "../../etc/passwd", "/etc/passwd",
    "a/b", "x" * 5000, [], {}, [1], ["x"], [[]], [None], {"a": 1}, {"": {}}, [1.5] * 3,
    [0] * 70_000,
    {"name": {"name": []}}, "model.safetensors", "BF16", "F4", "I8", "float32", "llama", "gda",
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        keys = item.keys() if isinstance(item, dict) else range(min(len(item), 100))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], dict | list):
                waiting.append(item[key])
    return found


def damage_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one or two places changed."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        everywhere = places(value) if isinstance(value, dict | list) else []
        if not everywhere or rng.random() < 0.02:
            return rng.choice(HOSTILE)
        container, key = rng.choice(everywhere)
        kind = rng.randrange(10)
        if kind < 6:
            container[key] = rng.choice(HOSTILE)
        elif kind == 6:
            del container[key]
        elif kind == 7 and isinstance(container[key], int | float):
            container[key] = type(container[key])(container[key] * rng.choice((-1, 2, 3, 1000)))
        elif kind == 8:
            other, name = rng.choice(everywhere)
            container[key] = json.loads(
                json.dumps(other.get(name) if isinstance(other, dict) else 0)
            )
        elif isinstance(container, dict):
            container[rng.choice(("", "x", "9" * 5000, "\ud800", f"{key}.0"))] = rng.choice(HOSTILE)
    return value


def json_text(rng: random.Random, value: Any) -> bytes:
    """Text of a value, sometimes with what no encoder writes."""
    text = json.dumps(value)
    kind = rng.randrange(40)
    if kind == 0:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    elif kind == 1:
        text = text.replace("1", "9" * 5000, 1)
    elif kind == 2:
        text = DEEP
    elif kind == 3:
        text = "\ufeff" + text
    elif kind == 4:
        text = text.replace('"', '"\\ud800', 1)
    elif kind == 5:
        text = "[" * 100_000
    elif kind == 6:
        text = text.replace("{", '{"many": [' + "[]," * 3_000_000 + "[]], ", 1)
    return text.encode()


def damage_json(rng: random.Random, path: Path) -> None:
    value = damage_value(rng, json.loads(path.read_bytes()))
    path.write_bytes(json_text(rng, value))


def damage_lines(rng: random.Random, path: Path) -> None:
    lines = path.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json_text(rng, damage_value(rng, json.loads(lines[place])))
    path.write_bytes(b"\n".join(lines) + b"\n")


def damage_yaml(rng: random.Random, path: Path) -> None:
    import yaml

    if "&" in path.read_text():  # a bomb already
        damage_bytes(rng, path)
        return
    kind = rng.randrange(12)
    if kind == 0:
        text = path.read_text() + BOMB
    elif kind == 1:
        text = path.read_text() + "recursive: &r [*r]\n"
    elif kind == 2:
        text = path.read_text() + "deep: " + "[" * 50_000
    else:
        text = json.dumps(damage_value(rng, yaml.safe_load(path.read_text())))
    path.write_text(text)


def damage_header(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = json_text(rng, damage_value(rng, header))
    stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(text) + 8))
    path.write_bytes(stated.to_bytes(8, "little") + text + data)


def damage_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        del content[rng.randrange(len(content) + 1) :]
    elif kind == 1:
        content = bytearray(len(content))
    elif kind == 2:
        place = rng.randrange(len(content) + 1)
        content[place:place] = rng.randbytes(rng.randrange(1, 64))
    elif kind == 3:
        content *= 2
    else:
        for _ in range(rng.choice((1, 1, 4, 50))):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20_000_000_000)


STAND_INS: tuple[Callable[[Path], Any], ...] = (
    _pipe,
    _socket,
    _holes,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/proc/self/mem"),
    lambda path: path.touch(),
    lambda path: None,
)


def replace_file(rng: random.Random, path: Path) -> None:
    path.unlink()
    rng.choice(STAND_INS)(path)


_BY_ENDING = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".yaml": damage_yaml,
    ".safetensors": damage_header,
}


def damage(rng: random.Random, folder: Path) -> str:
    """Damage one or two files of a folder; says what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            break
        path = rng.choice(files)
        kind = rng.random()
        change = _BY_ENDING.get(path.suffix, damage_bytes)
        if kind < 0.12:
            change = replace_file
        elif kind < 0.25:
            change = damage_bytes
        try:
            change(rng, path)
        except (ValueError, RecursionError, KeyError, TypeError, OSError, OverflowError):
            damage_bytes(rng, path) if path.is_file() else None  # it was damaged already
        done.append(f"{change.__name__} {path.relative_to(folder)}")
    return ", ".join(done)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
