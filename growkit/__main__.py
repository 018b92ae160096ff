"""``python -m growkit ...``."""

from growkit.cli.main import run

run()
