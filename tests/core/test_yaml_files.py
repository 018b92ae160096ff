# SPDX-License-Identifier: Apache-2.0
"""The YAML reader: aliases, depth and digits are bounded; honest documents read as before."""

import pytest
import yaml

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.yaml_files import IncrementLoader, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
HOSTILE = {
    "bomb": (BOMB, "line 6 is not valid YAML: more than 100000 values"),
    "merge bomb": (
        "a0: &a0 {k0: 1}\n"
        + "".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n"
            for i in range(1, 20)
        ),
        "more than 100000 values",
    ),
    "an alias of its own sequence": ("a: &a [1, *a]", "refers to the value that holds it"),
    "an alias of its own mapping": ("&a {b: {c: *a}}", "refers to the value that holds it"),
    "depth": ("[" * 100_000, "nested deeper than 50 levels"),
    "depth by lines": ("".join(f"{' ' * i}a:\n" for i in range(400)), "nested deeper than 50"),
    "digits": ("a: " + "9" * 5000, "an integer of 5000 digits"),
    "hexadecimal digits": ("a: 0x" + "f" * 50_000, "an integer of 50002 digits"),
    "lone surrogate": (r'a: "\ud800"', "has half of a surrogate pair"),
    "object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "unhashable key": ("{[1]: 2}", "not valid YAML"),
    "impossible date": ("a: 2026-13-45", "not valid YAML"),
    "NUL": ("a: \0", "not valid YAML"),
    "a key twice": ("a: 1\na: 2", "line 2 gives 'a' a second time"),
    "unknown anchor": ("a: *b", "undefined alias"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
}


@pytest.mark.parametrize("loader", [None, IncrementLoader])
@pytest.mark.parametrize("case", HOSTILE)
def test_refused_with_a_sentence(case, loader):
    text, message = HOSTILE[case]
    with pytest.raises(UsageError, match=message):
        parse_yaml(text, "some.yaml", **({"loader": loader} if loader else {}))


def test_honest_documents_read_as_pyyaml_reads_them():
    text = """
    base: &base {rate: 1e-3, steps: 10, list: [1, 2.5, true, null, 2026-01-02]}
    other: {<<: *base, steps: 0x10}
    same: [*base, *base]
    text: |
      two
      lines
    """
    assert parse_yaml(text, "x") == yaml.safe_load(text)
    assert parse_yaml("", "x") is None
    assert parse_yaml("heads: +8\nhex: 12", "x", IncrementLoader) == {"heads": "+8", "hex": 12}


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: 1")
    assert read_yaml(path) == {"a": 1}
    path.write_text("a: [")
    with pytest.raises(CheckpointError, match=r"a\.yaml line 1 is not valid YAML"):
        read_yaml(path, error=CheckpointError)
    path.write_text("# " + "x" * 600_000)
    with pytest.raises(UsageError, match="larger than 500000 bytes"):
        read_yaml(path)
