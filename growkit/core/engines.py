# SPDX-License-Identifier: Apache-2.0
"""What is known of serving engines: one table, each fact with the version it was seen in. No torch.

Engines read config.json by rules of their own. Warnings of plans and notes of exports are made from
this table, and docs/serving.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

# Attention functions that engines put in the place of transformers' (vLLM, SGLang, TGI). They read
# keywords of their own, which the engine hands through the model.
ENGINES = ("vllm", "sglang", "tgi")
BY_TRANSFORMERS = "vllm serve --model-impl transformers"


@dataclass(frozen=True)
class EngineFact:
    """How an engine reads models of some types.

    Attributes:
        engine: its name.
        seen: version, and whether it was run or its source read.
        model_types: of config.json.
        does: what it does, in words that follow its name.
        outcome: what comes of it where the config says otherwise.
        remedy: what to do with that engine, or empty.
    """

    engine: str
    seen: str
    model_types: tuple[str, ...]
    does: str
    outcome: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.engine} ({self.seen}) {self.does}, and {self.outcome}{remedy}"


# head_dim = hidden_size / num_attention_heads, whatever config.json says.
DERIVED_HEAD_DIM = (
    EngineFact(
        "llama.cpp",
        "2026-11, run",
        ("qwen2", "olmo2", "olmo3", "granite"),
        "takes hidden_size / num_attention_heads for head_dim",
        "refuses the file (attn_q has a wrong shape)",
    ),
    EngineFact(
        "vLLM's own Qwen2 class",
        "0.32, run",
        ("qwen2",),
        "takes hidden_size / num_attention_heads for head_dim",
        "answers wrongly without an error",
        f"serve it by transformers' class ({BY_TRANSFORMERS})",
    ),
    EngineFact(
        "vLLM's own OLMo class",
        "source read, not run",
        ("olmo2", "olmo3"),
        "takes hidden_size / num_attention_heads for head_dim",
        "has no room for the weights",
        f"serve it by transformers' class ({BY_TRANSFORMERS})",
    ),
)
# The kinds of layers by their index, whatever lists config.json holds.
FIXED_PATTERN = (
    EngineFact(
        "llama.cpp",
        "2026-11, run",
        ("gemma3_text",),
        "gives every sixth layer full attention and the others a window",
        "computes another function",
    ),
    EngineFact(
        "llama.cpp",
        "source read, not run",
        ("gemma2",),
        "gives every second layer full attention and the others a window",
        "computes another function",
    ),
    EngineFact(
        "llama.cpp",
        "source read, not run",
        ("smollm3",),
        "leaves rotary position encoding out of every fourth layer",
        "computes another function",
    ),
)


def of_type(facts: tuple[EngineFact, ...], model_type: object) -> list[EngineFact]:
    """The facts that concern a model type."""
    return [fact for fact in facts if model_type in fact.model_types]


def derived_head_dim(model_type: object, hidden: int, heads: int, head_dim: int) -> str:
    """The engines that read other heads out of such a config, as text; empty: none does."""
    if heads * head_dim == hidden:
        return ""
    return "; ".join(map(str, of_type(DERIVED_HEAD_DIM, model_type)))


def fixed_pattern_note(model_type: object) -> str:
    """ ": ENGINE ..." for software that is known to assume a regular pattern of layers."""
    facts = of_type(FIXED_PATTERN, model_type)
    return f": {'; '.join(map(str, facts))}" if facts else ""


def markdown_table() -> str:
    """All facts, for docs/serving.md."""
    lines = [
        "| engine | seen in | `model_type` | what it does | then it |",
        "|---|---|---|---|---|",
    ]
    for fact in (*DERIVED_HEAD_DIM, *FIXED_PATTERN):
        types = ", ".join(f"`{name}`" for name in fact.model_types)
        remedy = f"; {fact.remedy}" if fact.remedy else ""
        lines.append(
            f"| {fact.engine} | {fact.seen} | {types} | {fact.does} | {fact.outcome}{remedy} |"
        )
    return "\n".join(lines)
