"""``python cli.py ...``: the command line without an install."""

from growkit.cli.main import run

if __name__ == "__main__":
    run()
