"""Advice as text: a table of figures, and a line for every finding with its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from growkit.advice.budget import OPTIMAL_TOKENS_PER_PARAMETER, tokens_per_parameter
from growkit.core.quantities import human_bytes, human_count

if TYPE_CHECKING:
    from growkit.advice import Advice


def advice_table(advice: Advice) -> Table:
    """The figures."""
    table = Table(title="training it", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for label, value in advice_rows(advice):
        table.add_row(label, value)
    return table


def advice_rows(advice: Advice) -> list[tuple[str, str]]:
    """(label, value) of every figure."""
    facts, budget = advice.facts, advice.budget
    rows = []
    if facts.new_parameters:
        part = facts.new_parameters / facts.parameters
        rows.append(("new parameters", f"{human_count(facts.new_parameters)} ({part:.1%})"))
    rows.append(("memory per process", _memory(advice)))
    rows.append(("base", _base(advice)))
    if budget.settled_tokens is not None:
        rows.append(
            (
                "settled after",
                f"{human_count(budget.settled_tokens)} tokens: warm-ups, thaw and Adam's moments; "
                "an evaluation before that says nothing about the growth",
            )
        )
    if budget.compare_tokens:
        rows.append(
            (
                "compare after",
                f"{human_count(budget.compare_tokens)} tokens, {OPTIMAL_TOKENS_PER_PARAMETER} per "
                "new parameter (rule of thumb from arXiv:2203.15556; LLaMA-Pro took 80 B for 1.3 B "
                "new)",
            )
        )
    of_what = "the recipe's" if facts.recipe is not None else "these"
    if budget.flops is not None and budget.tokens:
        rows.append(
            (
                "training FLOPs",
                f"{budget.flops:.3e} for {of_what} {human_count(budget.tokens)} tokens",
            )
        )
    if budget.hours is not None:
        hours = f"{budget.hours:,.2f}" if budget.hours < 100 else f"{budget.hours:,.0f}"
        rows.append(("hours", f"{hours} for {of_what} tokens at the given speed"))
    return rows


def _memory(advice: Advice) -> str:
    memory, setup = advice.memory, advice.facts.setup
    name = "Muon + AdamW" if setup.optimizer == "muon" else "AdamW"
    parts = [
        (memory.weights, "weights"),
        (memory.gradients, "gradients"),
        (memory.optimizer, name),
        (memory.buckets, "DDP buckets"),
        (memory.gathered, "gathered layers"),
        (memory.scattered, "their gradients and buffers"),
        (memory.autocast, "bf16 copies"),
    ]
    listed = ", ".join(f"{label} {human_bytes(size)}" for size, label in parts if size)
    how = "1 process" if setup.processes == 1 else f"{setup.processes} processes, {setup.strategy}"
    if setup.tensor > 1:
        how += f", layers shared by {setup.tensor}"
    if setup.context > 1:
        how += f", sequences shared by {setup.context}"
    return f"{human_bytes(memory.total)} and activations: {listed} ({setup.dtype} weights, {how})"


def _base(advice: Advice) -> str:
    facts, ratio = advice.facts, tokens_per_parameter(advice.facts)
    size = f"{human_count(facts.base_parameters)} parameters"
    if ratio is None or facts.trained_tokens is None:
        where = "--trained-tokens" if facts.recipe is None else "model.trained_tokens"
        return f"{size}; tokens seen: not recorded ({where})"
    verdict = "over-trained" if ratio > OPTIMAL_TOKENS_PER_PARAMETER else "not over-trained"
    return (
        f"{size}, {human_count(facts.trained_tokens)} tokens seen: {ratio:,.1f} a parameter, "
        f"{verdict} (compute-optimal: {OPTIMAL_TOKENS_PER_PARAMETER}, arXiv:2203.15556)"
    )


def finding_lines(advice: Advice, *, skip: frozenset[str] = frozenset()) -> list[str]:
    """One line a finding."""
    return [
        f"- {finding.text} [{finding.source}]"
        for finding in advice.findings
        if finding.name not in skip
    ]
