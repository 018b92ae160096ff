"""README.md of a grown or trained folder: the model card, with its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from growkit import __version__
from growkit.checkpoint.hub import HUB_ID, origin
from growkit.core.errors import GrowkitError
from growkit.core.files import read_text
from growkit.core.names import README
from growkit.core.printed_text import markdown_code, markdown_text
from growkit.core.yaml_files import parse_yaml

MAX_CARD_BYTES = 2_000_000


def model_card(source: Path, manifest: dict[str, Any], name: str) -> str:
    """Text of the card.

    Args:
        source: folder of the parent; its license and base model are carried over.
        manifest: of the grown folder.
        name: of the grown model.
    """
    header = _front_matter(source)
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["growkit", "model-growth"]}
    for key in ("license", "license_name", "license_link", "language", "base_model"):
        if _plain(header.get(key)):
            front[key] = header[key]
    if manifest["parent"].get("revision"):
        front["base_model"] = [manifest["parent"]["name"]]
    plan = manifest["plan"]
    converted = "convert" in manifest["request"]
    made, at = ("Converted", "in this form") if converted else ("Grown", "at this size")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {markdown_text(name)}",
        "",
        f"{made} from {markdown_code(manifest['parent']['name'])} by growkit "
        f"{manifest['growkit_version']}. "
        f"Initialised, not yet trained {at}.",
        "",
        "| | before | after |",
        "|---|---:|---:|",
        *_rows(plan),
        "",
        "## How",
        "",
        *[
            f"* {step['summary']}: {step['exactness']}. {step['reason']}."
            for step in plan["operators"]
        ],
        _copies(plan),
        "",
        "```yaml",
        yaml.safe_dump(recipe_of(manifest["request"]), sort_keys=False).strip(),
        "```",
        "",
        "## Proof",
        "",
        _proof(manifest),
        "",
        "## Next",
        "",
        "`growkit.json` lists which rows and columns are new; `growkit train` continues from here.",
        "",
    ]
    if plan["warnings"]:
        lines[-4:-4] = ["Warnings: " + "; ".join(map(markdown_text, plan["warnings"])) + ".", ""]
    return "\n".join(lines)


# What a parent's card says that stays true of a model that was trained on from it.
_KEPT = ("license", "license_name", "license_link", "language", "base_model", "datasets", "tags",
         "pipeline_tag")  # fmt: skip
_LINES = 12  # of the curve in a card


def training_card(
    source: Path | None, record: dict[str, Any], evaluations: Sequence[dict[str, Any]], name: str
) -> str:
    """Text of a trained folder's card.

    Names of local files and folders are left out: a card is made to be published.

    Args:
        source: folder that the run started from, whose card's metadata are kept; None: scratch.
        record: content of ``growkit_training.json``.
        evaluations: the lines of metrics.jsonl with a held-out loss, in order.
        name: of the trained model.
    """
    header = _front_matter(source) if source is not None else {}
    front = {key: header[key] for key in _KEPT if _plain(header.get(key))}
    parent, revision = origin(source) if source is not None else ("", None)
    if revision is not None:
        front["base_model"] = [parent]
    data, training = record["recipe"]["data"], record["recipe"]["training"]
    sections = data.get("mixture") or [data]
    hub = [s["dataset"]["path"] for s in sections if s.get("dataset")]
    hub = [path for path in hub if HUB_ID.fullmatch(path) and not Path(path).exists()]
    for key, more in (("tags", ["growkit"]), ("datasets", hub)):
        had = front.get(key, [])
        values = [had] if isinstance(had, str) else had
        if values or more:
            front[key] = list(dict.fromkeys([*values, *more]))
    begin = f"from {markdown_code(parent)}" if source is not None else "from scratch"
    facts = {
        "steps": f"{record['steps']:,}" + " (stopped early)" * bool(record.get("stopped_early")),
        "tokens": f"{record['tokens']:,}",
        "parameters": f"{record['parameters']:,}",
        "sequence length": f"{data.get('sequence_length', 512):,}",
        "learning rate": f"{training['learning_rate']:g}, {training['schedule']}",
        "optimizer": f"{training['optimizer']}, weight decay {training['weight_decay']:g}",
    }
    continued = sum(use["tokens"] for use in record["data"].values()) > record["tokens"]
    lines = [
        "---",
        yaml.safe_dump({"library_name": "transformers", **front}, sort_keys=False).strip(),
        "---",
        "",
        f"# {markdown_text(name)}",
        "",
        f"Trained {begin} by growkit {__version__}.",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        "## Data",
        "",
        f"| source | tokens read{', by earlier runs too' * continued} | epochs |",
        "|---|---:|---:|",
        *(
            f"| {markdown_text(source_name)} | {use['tokens']:,} | {use['epochs']:g} |"
            for source_name, use in record["data"].items()
        ),
        "",
    ]
    if evaluations:
        number = min(len(evaluations), _LINES)
        places = sorted({round(i * (len(evaluations) - 1) / max(number - 1, 1))
                         for i in range(number)})  # fmt: skip
        lines += [
            "## Held-out loss",
            "",
            f"Nats per token, over {record['held_out_tokens']:,} tokens.",
            "",
            "| step | tokens | loss | perplexity |",
            "|---:|---:|---:|---:|",
            *(
                f"| {row['step']:,} | {row['tokens']:,} | {row['eval_loss']:.4f} "
                f"| {row['perplexity']:.3f} |"
                for row in (evaluations[place] for place in places)
            ),
            "",
        ]
    lines += ["`growkit_training.json` holds the recipe and the figures.", ""]
    return "\n".join(lines)


def _plain(value: Any) -> bool:
    """A text, or a list of such, as these keys hold; other things of a foreign card stay behind."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and len(item) < 500 for item in items)


def recipe_of(request: dict[str, Any]) -> dict[str, Any]:
    """The request of a manifest as a recipe says it."""
    return request if "convert" in request else {"grow": request}


def _copies(plan: dict[str, Any]) -> str:
    if warm := plan.get("warm_start"):
        return (
            f"* warm start, not exact: old weights x {warm['shrink']:g}, zero-padded, plus a start "
            f"from scratch x {warm['perturb']:g}, seed {plan['seed']}"
        )
    return f"* symmetry of copies: {plan['symmetry']}, seed {plan['seed']}"


def _rows(plan: dict[str, Any]) -> list[str]:
    rows = [
        f"| {sizes['label']} | {sizes['before']:,} | {sizes['after']:,} |"
        for sizes in plan["axes"].values()
    ]
    for key, label in (
        ("parameters", "parameters"),
        ("non_embedding_parameters", "parameters without embeddings"),
        ("flops_per_token", "forward FLOPs per token"),
        ("kv_cache_bytes_per_token", "KV-cache bytes per token"),
    ):
        rows.append(f"| {label} | {plan['before'][key]:,} | {plan['after'][key]:,} |")
    return rows


def _proof(manifest: dict[str, Any]) -> str:
    verification = manifest.get("verification")
    if verification is None:
        return "Not verified (`--no-verify`). Run `growkit verify PARENT THIS_FOLDER`."
    return str(verification.get("summary", "See `growkit.json`."))


def _front_matter(source: Path) -> dict[str, Any]:
    try:
        text = read_text(source / README, limit=MAX_CARD_BYTES)
        if not text.startswith("---"):
            return {}
        value = parse_yaml(text.split("---", 2)[1], README)
    except (GrowkitError, IndexError):
        return {}
    return value if isinstance(value, dict) else {}
