"""Advice that is computed from a plan and a recipe: memory, tokens, FLOPs, known warnings.

No torch: ``growkit plan`` shows it before anything is written, ``growkit train`` before the first
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from growkit.advice.budget import Budget, Throughput, budget, tokens_per_parameter
from growkit.advice.facts import Facts, facts_of_plan, facts_of_recipe
from growkit.advice.findings import Finding, findings
from growkit.advice.memory import Memory, TrainingSetup, training_memory

__all__ = [
    "Advice",
    "Budget",
    "Facts",
    "Finding",
    "Memory",
    "Throughput",
    "TrainingSetup",
    "advise",
    "facts_of_plan",
    "facts_of_recipe",
]


@dataclass(frozen=True)
class Advice:
    """Everything that is said about a run.

    Attributes:
        parameters, new_parameters: of the model to be trained.
        tokens_per_parameter: that the base has seen; None where nobody says.
        memory: of one process, without activations.
    """

    facts: Facts
    memory: Memory
    budget: Budget
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        setup = self.facts.setup
        return {
            "parameters": self.facts.parameters,
            "new_parameters": self.facts.new_parameters,
            "base_parameters": self.facts.base_parameters,
            "trained_tokens": self.facts.trained_tokens,
            "tokens_per_parameter": tokens_per_parameter(self.facts),
            "setup": {**vars(setup)},
            "memory_per_process": self.memory.to_dict(),
            "context": self.facts.context,
            **self.budget.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
        }


def advise(facts: Facts, throughput: Throughput | None = None) -> Advice:
    """Compute all of it."""
    return Advice(
        facts=facts,
        memory=training_memory(facts.shapes, facts.new, facts.setup, facts.counts),
        budget=budget(facts, throughput or Throughput()),
        findings=tuple(findings(facts)),
    )
