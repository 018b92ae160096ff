"""Entry point: the command table, and the one place where an exception becomes a sentence."""

from __future__ import annotations

import importlib
import os
import sys

import typer

from growkit.errors import GrowkitError
from growkit.threads import wait_passively

# One line a command: name -> module in growkit.cli that holds a function of the same name.
# Modules here may import typer and growkit.cli only at their top; the work is imported inside.
COMMANDS = {
    "grow": "grow",
    "plan": "plan",
    "recipes": "recipes",
    "inspect": "inspect",
    "verify": "verify",
    "eval": "eval",
    "diff": "diff",
    "train": "train",
    "demo": "demo",
}


def _version(show: bool) -> None:
    if show:
        from growkit import __version__

        typer.echo(f"growkit {__version__}")
        raise typer.Exit()


def build_app() -> typer.Typer:
    """Assemble the typer application from the command table."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Grow a trained transformer, prove that it computes the same function, train it on.",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        pass

    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"growkit.cli.{module_name}")
        app.command(name, rich_help_panel=getattr(module, "PANEL", None))(getattr(module, name))
    return app


def _describe(error: BaseException) -> tuple[str, str, int] | None:
    """(cause, remedy, exit code) of an error that we can explain, or None."""
    if isinstance(error, GrowkitError):
        return error.cause, error.remedy, error.exit_code
    if isinstance(error, PermissionError):
        return f"No permission to use {error.filename!r}.", "Choose another folder.", 1
    if isinstance(error, OSError) and error.errno == 28:
        return "The disk is full.", "Free some space or choose another --out.", 1
    if isinstance(error, OSError) and error.errno == 30:
        return f"{error.filename!r} is on a read-only file system.", "Choose another --out.", 1
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 1 failure, 2 usage, 3 verification)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wait_passively()
    try:
        build_app()(args=arguments, standalone_mode=True)
    except (SystemExit, KeyboardInterrupt) as stop:
        # typer turns Ctrl-C within a command into SystemExit(130)
        exit_code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if exit_code == 130:
            typer.echo("interrupted", err=True)
        return exit_code if isinstance(exit_code, int) else 0
    except Exception as error:
        from growkit.cli import common

        verbose = common.current is not None and common.current.verbose
        known = _describe(error)
        if known is None or verbose:
            import traceback

            traceback.print_exc()
        if known is None:
            typer.echo("error: unexpected failure, see above.", err=True)
            return 1
        cause, remedy, code = known
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(f"{cause}\n       {remedy}" if remedy else cause, err=True)
        return code
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())
