"""``growkit study``: several ways to spend one training budget, compared over seeds."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    FlopsPerSecondOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    complete_recipe,
    complete_words,
    open_output,
)

if TYPE_CHECKING:
    from growkit.cli.output import Output
    from growkit.study.cluster import Cluster

PANEL = "Train"


def study(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe, or a name from 'growkit recipes'.",
            autocompletion=complete_recipe("study"),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results; default: studies/ and its name."),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of trained models, which studies may share; default: OUT/runs."),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these arms (and their bases).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1", help="Only these seeds.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time on every device.")] = 1,
    devices: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="auto, cpu, or cuda:0,cuda:1 ...",
            autocompletion=complete_words("auto", "cpu", "cuda:0"),
        ),
    ] = "auto",
    executor: Annotated[
        str,
        typer.Option(help="local, or slurm: every run is a job, --workers of them at a time."),
    ] = "local",
    partition: Annotated[str | None, typer.Option(help="Of the Slurm jobs.")] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of the Slurm jobs: time=120 (minutes), cpus_per_task=8, gpus_per_node=1, "
            "account=NAME ...",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Show what would be run, and what it costs; write nothing."),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Write table, plots and page of what is there; with a study's folder as RECIPE "
            "from its study.json alone.",
        ),
    ] = False,
    race: Annotated[
        bool,
        typer.Option(
            "--race",
            help="Halve the arms by short runs first; the survivors run to the budget with all "
            "seeds.",
        ),
    ] = False,
    flops_per_second: FlopsPerSecondOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare growth methods (or anything else) under the same training FLOPs, paired by seed.

    A killed study continues where it was, and a finished run is never made again.

    [dim]growkit study study-growth --out studies/growth --workers 2[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.cli.study_view import show_plan, show_result
    from growkit.core.errors import GrowkitError, UsageError
    from growkit.recipe.shipped import find_recipe
    from growkit.study.page import write_study
    from growkit.study.read_recipe import load_study
    from growkit.study.selection import choose
    from growkit.study.study import RECIPE, Study

    if recipe.is_dir():
        output.result({"written": _write_again(output, recipe, out, report)})
        return
    recipe = find_recipe(recipe, "study")
    loaded = load_study(recipe, overrides or [])
    choice = choose(loaded, _words(arms), _numbers(seeds))
    places = _devices(devices)
    cluster = _cluster(executor, partition, slurm or [])
    out = out or Path("studies") / recipe.stem.removeprefix("study-")
    if report and not (out / RECIPE).is_file():
        raise UsageError(
            f"--report: there is no study in {str(out)!r}.", "Give its folder with --out."
        )
    if plan:
        with TemporaryDirectory(prefix="growkit-plan-") as scratch:
            one = Study(loaded, out, runs or out / "runs", output, scratch=Path(scratch))
            shown = show_plan(output, one, choice, flops_per_second)
            if race:
                one.start_race(choice)
                assert one.race is not None
                short = one.race.section.shares
                output.show(
                    f"--race: at most {one.race.runs()} runs, halved after parts of the steps: "
                    f"{', '.join(f'{share:g}' for share in short)} (trials of rates beside them)."
                )
            output.result(shown)
        return
    one = Study(loaded, out, runs or out / "runs", output)
    changes = [word for override in overrides or [] for word in ("--set", override)]
    command = shlex.join(["growkit", "study", str(recipe), *changes, "--out", str(out)])
    command += " --race" if race else ""
    if report:
        if race:
            one.start_race(choice)
        result = one.result()
    else:
        try:
            result = one.run(choice, devices=places, workers=workers, race=race, cluster=cluster)
        except BaseException:  # Ctrl-C, too: what is finished is written
            if (one.out / RECIPE).is_file():
                write_study(one.result(), one.out, command=command)
            raise
    written = write_study(result, one.out, command=command, note=output.note)
    show_result(output, result, written)
    output.result(result.to_dict())
    if one.failed:
        reasons = sorted(set(one.failed.values()))
        raise GrowkitError(
            f"{len(one.failed)} runs of the study failed: {reasons[0].rstrip('.')}.",
            f"Their logs are {one.runs}/KEY/log.txt. The same command tries them again; what "
            "diverged needs a smaller learning rate.",
        )


def _write_again(output: Output, folder: Path, out: Path | None, report: bool) -> list[str]:
    """What a study (or every study in a folder) says, from ``study.json``: no text, no training.

    In its own folder, or as OUT/NAME.html.
    """
    from growkit.core.errors import UsageError
    from growkit.study.page import studies_in, write_pages, write_study
    from growkit.study.results import read_result

    if not report:
        raise UsageError(
            f"{str(folder)!r} is a folder, not a recipe.",
            "Add --report to write the page of a study again; a recipe is a YAML file.",
        )
    if out is not None:
        written = write_pages(folder, out)
    else:
        results = [(read_result(path), path) for path in studies_in(folder)]
        written = [write_study(result, path, note=output.note)[-1] for result, path in results]
    for path in written:
        output.show(str(path))
    return [str(path) for path in written]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _numbers(text: str | None) -> list[int]:
    from growkit.core.errors import UsageError

    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UsageError(
            f"--seeds {text!r} holds no numbers.", "For example --seeds 0,1."
        ) from None


def _cluster(executor: str, partition: str | None, settings: list[str]) -> Cluster | None:
    """Where runs are submitted to; None: they are processes of this machine."""
    from growkit.core.errors import UsageError

    given = dict(word.partition("=")[::2] for word in settings)
    if partition is not None:
        given["partition"] = partition
    if executor not in ("local", "slurm") or not all(given.values()):
        raise UsageError(
            f"--executor {executor!r} with --slurm {' '.join(settings)!r} cannot be used.",
            "Give local or slurm, and --slurm KEY=VALUE.",
        )
    if executor == "local":
        if given:
            raise UsageError(
                f"{', '.join(given)} of Slurm jobs, and the executor is local.",
                "Add --executor slurm.",
            )
        return None
    from growkit.study.cluster import Cluster

    if "time" in given:
        given["timeout_min"] = given.pop("time")
    shared = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "name")
    options = {name if name in shared else f"slurm_{name}": v for name, v in given.items()}
    return Cluster({k: int(v) if v.isdigit() else v for k, v in options.items()})


def _devices(text: str) -> list[str]:
    import re

    from growkit.core.errors import UsageError

    devices = _words(text)
    for device in devices:
        if not re.fullmatch(r"auto|cpu|cuda:\d+", device) or devices.count(device) > 1:
            raise UsageError(
                f"--devices {text!r} cannot be used.", "Give auto, cpu, or cuda:0,cuda:1 ..."
            )
    if not devices or ("auto" in devices and len(devices) > 1):
        raise UsageError(f"--devices {text!r} cannot be used.", "auto stands alone.")
    return devices
