"""Public-domain text that comes with growkit: about 1.1 MB of Shakespeare's plays."""

from importlib.resources import files


def sample_text() -> str:
    """The whole built-in English sample (public domain)."""
    return files("growkit.samples").joinpath("shakespeare.txt").read_text(encoding="utf-8")
