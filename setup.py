"""The package's long description: README.md with links that hold outside the repository.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = "https://github.com/growkit/growkit/blob/main/"
RAW = "https://raw.githubusercontent.com/growkit/growkit/main/"


def absolute_links(markdown: str) -> str:
    """Relative links and images as addresses; code and other links as they are."""

    def moved(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        return f"{image}[{text}]({RAW if image else REPOSITORY}{target})"

    link = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [link.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    from setuptools import setup

    setup(
        long_description=absolute_links(Path("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
