"""What a study cannot say, found in its own results. No torch."""

from __future__ import annotations

from math import isfinite

from growkit.core.quantities import human_count, percent
from growkit.study.results import StudyResult
from growkit.study.savings import savings
from growkit.study.statistics import CONFIDENCE, findings, seeds_text, t_quantile

# A run that ends this far from the budget was not given the same as the others.
OFF_BUDGET = 0.02


def limits(result: StudyResult) -> list[str]:
    """One sentence each; what is particular to this study first, what holds for any last."""
    return [
        *_of_runs(result),
        *_of_comparisons(result),
        *_of_targets(result),
        *_of_any(result),
    ]


def _of_runs(result: StudyResult) -> list[str]:
    said = []
    missing, alone, diverged = [], [], []
    kept = result.race.rungs[-1].kept if result.race and result.race.rungs else None
    out = [arm.label for arm in result.arms if kept is not None and arm.name not in kept]
    for arm in result.arms:
        done = {run.seed for run in arm.runs}
        for seed, why in sorted(arm.failed.items()):
            said.append(f"{arm.label}: the run of seed {seed} failed: {why}")
        open_ = [seed for seed in result.seeds if seed not in done and seed not in arm.failed]
        infinite = [run.seed for run in arm.runs if not isfinite(run.final_loss)]
        if arm.label not in out:
            missing += [f"{arm.label} ({seeds_text(open_)})"] if open_ else []
        diverged += [f"{arm.label} ({seeds_text(infinite)})"] if infinite else []
        alone += [arm.label] if len(done) == 1 else []
        whole = result.budget_of(arm)
        off = [run for run in arm.runs if abs(run.flops / whole - 1) > OFF_BUDGET]
        if off:
            part = percent(off[0].flops / whole, 1)
            said.append(f"{arm.label}: spent {part} of the budget (seed {off[0].seed}).")
    edges = [
        f"{result.label(name)} ({sweep.chosen:g})"
        for name, sweep in result.sweeps().items()
        if sweep.at_edge
    ]
    for text, arms in (
        ("Not finished", missing),
        ("Put out by the race, so not run to the budget", out),
        ("One seed, so the spread is not known", alone),
        ("The loss is not finite", diverged),
        ("The best learning rate is at the edge of its sweep, a better one may lie outside", edges),
    ):
        said += [f"{text}: {'; '.join(arms)}."] if arms else []
    return said


def _of_comparisons(result: StudyResult) -> list[str]:
    found = findings(result)
    said = [
        f"{one.label} against {one.against_label}: {one.answer}."
        for one in found
        if one.direction == "unknown"
    ]
    counts = [one.estimate.count for one in found if one.estimate]
    if 2 in counts:
        said.append(
            "With two seeds an interval reaches 12.7 standard errors to each side: only very large "
            "differences can be shown."
        )
    lost = [one for one in found if one.direction in ("lower", "higher") and not one.survives]
    if lost:
        # What the smallest of so many p-values has to be under, as a multiple of its error.
        seeds, compared = max(counts), lost[0].compared
        needed = t_quantile(1 - (1 - CONFIDENCE) / compared, seeds - 1)
        said.append(
            f"{compared} comparisons with {seeds} seeds: Holm's correction first passes a mean "
            f"difference of {needed:.1f} standard errors. Fewer questions or more seeds show more."
        )
    if any(one.direction == "none" for one in found):
        said.append(
            "No difference shown does not mean that there is none: what lies inside the interval "
            "is still possible."
        )
    return said


def _of_targets(result: StudyResult) -> list[str]:
    missed, alone = [], []
    for arm, saving in zip(result.arms, savings(result), strict=True):
        seeds = [seed for seed, flops in saving.flops.items() if flops is None]
        missed += [f"{arm.label} ({seeds_text(seeds)})"] if seeds else []
        alone += [arm.label] if arm.runs and saving.reference is None else []
    said = []
    if missed:
        said.append(
            "No mean of the FLOPs to the target is given where a seed did not reach it: "
            f"{'; '.join(missed)}."
        )
    if alone:
        said.append(
            "No saving is given where the study trains no model of the same shape from scratch: "
            f"{'; '.join(alone)}."
        )
    return said


def _of_any(result: StudyResult) -> list[str]:
    if not any(arm.runs for arm in result.arms):
        return ["No run is finished yet."]
    said = [
        "The intervals cover the seeds alone (initial weights and the order of the data). Another "
        "text, another model size or a larger budget may answer differently; every loss is of the "
        f"same {human_count(result.held_out_tokens)} held-out tokens.",
    ]
    sweeps = [arm.sweep for arm in result.arms if arm.sweep]
    if sweeps:
        share = min(sweep.share for sweep in sweeps)
        seeds = sorted({sweep.seed for sweep in sweeps})
        said.append(
            f"Learning rates were chosen by whole runs with {seeds_text(seeds)}; the best of them "
            "are among the results."
            if share == 1.0
            else f"Learning rates were chosen on {percent(share)} of the steps with "
            f"{seeds_text(seeds)}; the best rate of a whole run may be another one."
        )
    said.append(
        "Where the learning rate decays to the end of the budget, a curve drops in the decay: "
        "crossings of a target bunch there, and FLOPs to a target inside it say little more than "
        "the final losses do."
    )
    return said
