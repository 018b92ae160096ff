"""The command table and the typer application made of it."""

from __future__ import annotations

import importlib

import typer

# One line a command: name -> module in growkit.cli that holds a function of the same name.
# Modules here may import typer and growkit.cli only at their top; the work is imported inside.
COMMANDS = {
    "grow": "grow",
    "convert": "convert",
    "export": "export",
    "refresh": "refresh",
    "plan": "plan",
    "advise": "advise",
    "recipes": "recipes",
    "inspect": "inspect",
    "index": "index",
    "tokenizer": "tokenizer",
    "derive": "derive",
    "verify": "verify",
    "eval": "eval",
    "diff": "diff",
    "train": "train",
    "report": "report",
    "push": "push",
    "study": "study",
    "demo": "demo",
}


def _version(show: bool) -> None:
    if show:
        from growkit import __version__

        typer.echo(f"growkit {__version__}")
        raise typer.Exit()


def build_app(given: str | None = None) -> typer.Typer:
    """Assemble the typer application from the command table.

    Args:
        given: the first word of the command line. Where it names a command, no other is built:
            reading the signatures of all of them takes longer than many a command.
    """
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
            False, "--version", "-V", callback=_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        pass

    for name in [given] if given in COMMANDS else COMMANDS:
        module = importlib.import_module(f"growkit.cli.{COMMANDS[name]}")
        app.command(name, rich_help_panel=getattr(module, "PANEL", None))(getattr(module, name))
    return app
