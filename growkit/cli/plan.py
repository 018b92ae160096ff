"""``growkit plan``: what a growth would do, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    ADVICE,
    CheckpointArgument,
    FlopsPerSecondOption,
    JsonOption,
    QuietOption,
    RevisionOption,
    TokensPerSecondOption,
    VerboseOption,
    complete_recipe,
    local_folder,
    open_output,
)
from growkit.cli.growth_options import growth_options

if TYPE_CHECKING:
    from growkit.cli.output import Output
    from growkit.surgery.request import GrowthRequest

PANEL = "Grow"


@growth_options
def plan(
    checkpoint: CheckpointArgument,
    request: GrowthRequest,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor of the grown checkpoint.")
    ] = False,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Write this growth as a recipe for --recipe, in a new file."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="In place of a growth: propose one for so many tokens or training FLOPs "
            "(2e9tokens, 3e17flops), as 'growkit advise' does; --save-recipe writes it."
        ),
    ] = None,
    train_recipe: Annotated[
        Path | None,
        typer.Option(
            help="Training recipe that the advice is for, as for 'growkit train'.",
            autocompletion=complete_recipe("train"),
            rich_help_panel=ADVICE,
        ),
    ] = None,
    trained_tokens: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Tokens that the source has seen (15e12), where no record of growkit's says it.",
            rich_help_panel=ADVICE,
        ),
    ] = None,
    tokens_per_second: TokensPerSecondOption = None,
    flops_per_second: FlopsPerSecondOption = None,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a growth would write: sizes, cost, exactness. Reads headers only.

    A folder with a config.json and no weights is enough.

    [dim]growkit plan ckpt/ --signal-heads x2[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output, weights=False)
    if budget is not None:
        _propose(output, folder, budget, request, save_recipe)
        return
    from growkit.advice import Throughput, advise, facts_of_plan
    from growkit.checkpoint import open_checkpoint
    from growkit.recipe.shipped import find_recipe
    from growkit.record.plan_report import plan_report, tensor_report
    from growkit.surgery.lambdas import check_lambdas, layer_lambdas
    from growkit.surgery.plan import declare_tensors, plan_growth

    training = None
    if train_recipe is not None:
        from growkit.training import load_recipe

        training = load_recipe(find_recipe(train_recipe, "train"))
    with open_checkpoint(folder, require_tensors=False) as source:
        has_weights = bool(source.tensors)
        if not has_weights:
            declare_tensors(source)
        made = plan_growth(source, request)
        if has_weights:
            lambdas = layer_lambdas(source, made.source_family, made.source_sizes["layer"])
            check_lambdas(made.source_family, lambdas)
        report = plan_report(made)
        details = tensor_report(made) if tensors else []
        advice = advise(
            facts_of_plan(made, training, None if trained_tokens is None else int(trained_tokens)),
            Throughput(tokens_per_second, flops_per_second),
        )
    report["advice"] = advice.to_dict()
    if tensors:
        report["tensor_list"] = details
    if not (json_mode or quiet):
        from growkit.cli.advice_view import advice_table, finding_lines
        from growkit.cli.plan_view import plan_tables
        from growkit.core.quantities import human_bytes

        output.show(*plan_tables(report), advice_table(advice))
        # Copies that stay equal are among the plan's own warnings.
        output.show(*finding_lines(advice, skip=frozenset({"identical-copies"})))
        for entry in details:
            shapes = f"{entry['source_shape']} -> {entry['shape']}"
            output.show(
                f"{entry['action']:9} {entry['name']} {shapes} {human_bytes(entry['bytes'])}"
            )
    for warning in report["warnings"]:
        output.warn(warning)
    if save_recipe is not None:
        from growkit.recipe.shipped import save

        save(save_recipe, request.to_dict(), str(checkpoint), revision)
        output.note(f"wrote {save_recipe}")
    output.result(report)


def _propose(
    output: Output, folder: Path, budget: str, request: GrowthRequest, out: Path | None
) -> None:
    from growkit.cli.advise import MEMORY, show_proposal
    from growkit.core.errors import UsageError

    if asked := request.flags():
        raise UsageError(
            f"--budget proposes a growth, and {', '.join(asked)} asks for one.",
            "Leave one of them out.",
        )
    show_proposal(output, folder, budget, None, out, MEMORY)
