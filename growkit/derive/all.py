"""Tables for every model of transformers that growkit can derive: ``python -m growkit.derive.all``.

One process a model type, with a limit of time and of memory, one after another; a run that is
stopped goes on where it was. What was proven and what was not, and why, is written beside the
tables as ``report.json``, and shown by ``--markdown`` as the coverage page of the documentation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

from growkit.core.writing import write_whole
from growkit.families.derived.store import SHIPPED, file_stem

_OF_GLM4V = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        }
    }
}
_COMPASS = {
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 10,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": None,
    },
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
# What a class needs and does not put itself, or puts unlike every published model: from its config.
_LACKING: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500_000.0}},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", **_COMPASS}},
    "granitemoehybrid": {
        "layer_types": [
            "full_attention" if layer % 8 == 5 else "linear_attention" for layer in range(32)
        ],
    },
    "lfm2": {
        "num_hidden_layers": 16,
        "layer_types": [
            "full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)
        ],
    },
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": [
            "full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)
        ],
    },
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **_QWEN4}},
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _OF_GLM4V),
    "voxtral": {"audio_token_id": 24},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "aya_vision": {"alignment_intermediate_size": 28_672},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
}
# What published checkpoints say where the class's default is another: a further table each.
_FURTHER: dict[str, list[dict[str, Any]]] = {
    "deberta-v2": [
        {
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": -1,
            "position_biased_input": False,
            "type_vocab_size": 0,
        }
    ],
    "falcon_h1": [{"mamba_norm_before_gate": False}],
    "glm": [{"attention_bias": False}],
    "glm4": [{"attention_bias": False}],
    "glm4_moe": [{"attention_bias": True}],
    "granitemoehybrid": [
        {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["full_attention"] * 32,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
        }
    ],
    "marian": [{"scale_embedding": True}],
    "phimoe": [{"attention_bias": True, "lm_head_bias": True}],
    "stablelm": [{"use_qkv_bias": True}],
}
# What nearly every model file of transformers imports.
_SHARED = (
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.bamba.modeling_bamba",
)
# What the coverage page tells of every type, and the columns of its summary.
OPTIONS = {
    "--layers": "depth",
    "--decoder-layers": "decoder's depth",
    "--ffn": "FFN",
    "--query-heads": "query heads",
    "--heads": "heads",
    "--kv-heads": "key/value heads",
    "--head-dim": "head size",
    "--hidden": "hidden size",
    "--experts": "experts",
    "--vocab": "vocabulary",
}
COLUMNS = {
    "depth": ("--layers",),
    "decoder's depth": ("--decoder-layers",),
    "FFN": ("--ffn",),
    "query heads": ("--query-heads", "--heads"),
    "head size": ("--head-dim",),
    "hidden size": ("--hidden",),
    "experts": ("--experts",),
    "vocabulary": ("--vocab",),
}
REASONS = ("--layers", "--ffn", "--heads", "--hidden")
# transformers' own lists, on which the goals are read off.
LISTS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


# Kind -> the Auto classes that load its types; a type is of the first kind that has it. A wrapper
# is a language model beside towers (vision, audio), whose text part grows.
KINDS = {
    "wrapper": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "encoder_decoder": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "masked": ("AutoModelForMaskedLM",),
    "causal": ("AutoModelForCausalLM",),
    "tower": ("AutoModel",),
    "vision": ("AutoModelForImageClassification", "AutoBackbone"),
    "audio": ("AutoModelForCTC", "AutoModelForAudioClassification"),
}
TOWERS = re.compile(r".*(vision_model|vision_encoder|audio_encoder)|dinov2.*|dinov3_vit")
TITLES = {
    "causal": "Causal language models",
    "wrapper": "Wrappers: the text part of a multimodal model",
    "encoder_decoder": "Encoder-decoders: both stacks",
    "masked": "Masked language models",
    "vision": "Vision encoders",
    "audio": "Audio encoders",
    "tower": "Vision and audio encoders without a head",
}


def model_types() -> dict[str, tuple[str, str]]:
    """Model type -> (kind, name of the Auto class that loads it), as this transformers has them."""
    import transformers

    found: dict[str, tuple[str, str]] = {}
    for kind, autos in KINDS.items():
        for auto in (name for name in autos if hasattr(transformers, name)):
            names = getattr(transformers, auto)._model_mapping._model_mapping
            for model_type, cls in sorted(names.items()):
                plain = kind == "wrapper" and str(cls).endswith("ForCausalLM")
                other = kind == "tower" and not TOWERS.fullmatch(model_type)
                if not plain and not other and model_type not in found:
                    found[model_type] = kind, auto
    return found


def state_of_the_code() -> str:
    """Hash of what derives and reads tables: an entry of the report says which made it."""
    from growkit import families

    digest = hashlib.sha256()
    room = Path(families.__file__).parent
    files = [*Path(__file__).parent.glob("*.py"), *room.glob("derived/*.py")]
    files = [*sorted(files), room / "layer_fields.py"]
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def derive_one(model_type: str, out: Path) -> dict[str, Any]:
    """Derive the default config of a type; the entry of the report."""
    import transformers
    from transformers import AutoConfig

    from growkit.derive.builder import said_by
    from growkit.derive.derivation import derive, save_table
    from growkit.verification.loading import quiet_transformers

    started, used = time.time(), time.process_time()
    kind, auto = model_types().get(model_type, ("causal", "AutoModelForCausalLM"))
    entry: dict[str, Any] = {"model_type": model_type, "kind": kind}
    at = ["config"]

    def step(text: str) -> None:
        at.append(text)

    try:
        for old in out.glob(f"{file_stem(model_type)}-*.json"):
            old.unlink()
        for changes in ({}, *_FURTHER.get(model_type, [])):
            with quiet_transformers():
                config = AutoConfig.for_model(
                    model_type, **{**_LACKING.get(model_type, {}), **changes}
                )
            table = derive(config, step, getattr(transformers, auto))
            proven = any("error" in proof for proof in table["operators"].values())
            name = save_table(table, out).name if proven else None
            if changes:
                entry.setdefault("further", []).append(
                    {"config": changes, "operators": table["operators"], "table": name}
                )
            else:
                entry["operators"] = table["operators"]
                if name:
                    entry["table"] = name
    except Exception as error:  # a defect, or a class of its own kind: reported
        entry["failed"] = f"{at[-1]}: {said_by(error)}"
    entry["seconds"] = round(time.time() - started, 1)
    entry["cpu_seconds"] = round(time.process_time() - used, 1)
    return entry


def _child(model_type: str, out: Path, seconds: int, memory: int, answer: Any) -> None:
    """Derive a type within limits of time and memory, where the system has them."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    except (ImportError, ValueError, OSError):
        pass  # without: the system has no such limit
    if hasattr(signal, "alarm"):
        signal.alarm(6 * seconds)  # of a machine that others use too
    import torch

    torch.set_num_threads(1)
    answer.send(derive_one(model_type, out))


def run_all(
    out: Path,
    report: Path,
    types: Sequence[str],
    *,
    seconds: int,
    memory: int,
    again: str = "missing",
) -> None:
    """Derive every type that the report does not have yet.

    ``again``: ``unproven``, also those of which depth, FFN or heads are not proven, by an older
    state of the code; ``old``: all that an older state made.
    """
    code = state_of_the_code()
    done: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    os.makedirs(out, exist_ok=True)
    # A forked child need not import torch and transformers again: that takes longer than the rest.
    forks = "fork" in multiprocessing.get_all_start_methods()
    processes: Any = multiprocessing.get_context("fork" if forks else "spawn")
    if forks:
        for name in ("growkit.derive.derivation", *_SHARED):
            import_module(name)
    for number, model_type in enumerate(types, 1):
        if (entry := done.get(model_type)) is not None:
            whole = all(proven(entry, option) for option in ("--layers", "--ffn", "--heads"))
            if entry.get("code") == code or again == "missing" or (whole and again == "unproven"):
                continue
        receive, send = processes.Pipe(duplex=False)
        child = processes.Process(target=_child, args=(model_type, out, seconds, memory, send))
        child.start()
        send.close()
        try:
            done[model_type] = receive.recv()
        except EOFError:
            child.join()
            why = f"run: ended with {child.exitcode} ({seconds} s of CPU time, {memory} bytes)"
            kind = model_types().get(model_type, ("causal",))[0]
            done[model_type] = {"model_type": model_type, "kind": kind, "failed": why}
        child.join()
        done[model_type]["code"] = code
        write_whole(report, json.dumps(done, indent=1, sort_keys=True) + "\n")
        print(f"{number}/{len(types)} {line_of(done[model_type])}", flush=True)


def what_builds(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Of the types on transformers' lists of which nothing is proven: Auto class -> type -> why a
    model of its default config cannot be made (on the meta device, its numbers left out), or empty.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    from growkit.derive.builder import Builder, Underivable, said_by
    from growkit.verification.loading import quiet_transformers

    result: dict[str, dict[str, str]] = {}
    for auto, name in LISTS.items():
        found = result.setdefault(auto, {})
        for model_type in dict(getattr(modeling_auto, name, {})):
            if _any_proven(entries, model_type):
                continue
            found[model_type] = ""
            try:
                with quiet_transformers():
                    config = AutoConfig.for_model(model_type, **_LACKING.get(model_type, {}))
                    Builder(config, getattr(transformers, auto)).shapes(config.to_dict())
            except Underivable:
                pass  # too large to be made here with its numbers
            except Exception as error:  # whatever it objects to
                found[model_type] = said_by(error)
    return result


def proven(entry: dict[str, Any], option: str) -> bool:
    """The report says that a growth is proven."""
    return "error" in entry.get("operators", {}).get(option, {})


def line_of(entry: dict[str, Any]) -> str:
    """One line about a type."""
    if "failed" in entry:
        return f"{entry['model_type']}: {entry['failed']}"
    words = [option for option in OPTIONS if proven(entry, option)]
    return f"{entry['model_type']}: {' '.join(words) or 'nothing'} ({entry['seconds']} s)"


def counted_on_lists(
    entries: Mapping[str, dict[str, Any]], builds: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """A table of what is proven of every type of an Auto class of this transformers, whatever kind
    it is derived as; ``builds``: :func:`what_builds`."""
    import transformers
    from transformers.models.auto import modeling_auto

    yield f"Counted on the lists of the Auto classes of transformers {transformers.__version__}"
    yield "(a type may stand in several, and those of which nothing is derived count too):"
    yield ""
    yield f"| list | types | can be made | derived | {' | '.join(COLUMNS)} |"
    yield "|---|---:|---:|---:|" + "---:|" * len(COLUMNS)
    for auto, name in LISTS.items():
        names = list(dict(getattr(modeling_auto, name, {})))
        found = [entries.get(kind, {}) for kind in names]
        counts = [
            sum(any(proven(entry, option) for option in options) for entry in found)
            for options in COLUMNS.values()
        ]
        derived = sum(_any_proven(entries, kind) for kind in names)
        without = [
            t for t, why in builds.get(auto, {}).items() if why and not _any_proven(entries, t)
        ]
        made = len(found) - len(without)
        yield f"| `{auto}` | {len(found)} | {made} | {derived} | {' | '.join(map(str, counts))} |"
    yield ""
    yield "No model can be made of the default config of these, with torch and transformers alone:"
    yield ""
    told: dict[str, str] = {}
    for found_here in builds.values():
        told |= {t: why for t, why in found_here.items() if why and not _any_proven(entries, t)}
    for model_type, why in sorted(told.items()):
        yield f"* `{model_type}`: {_cell(why)}"


def _any_proven(entries: Mapping[str, dict[str, Any]], model_type: str) -> bool:
    """Something is proven of a type."""
    return any(proven(entries.get(model_type, {}), option) for option in OPTIONS)


def markdown(
    entries: Sequence[dict[str, Any]], versions: str, builds: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """The coverage page: what is proven of each kind, then every type."""
    of_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TITLES}
    for entry in entries:
        of_kind.setdefault(entry.get("kind", "causal"), []).append(entry)
    of_kind = {kind: members for kind, members in of_kind.items() if members}
    yield "# Models that growkit knows from their classes"
    yield ""
    yield (
        f"Made by `python -m growkit.derive.all` with {versions}: from the default config of each "
        "class of transformers, each growth carried out on a small twin, saved, loaded again and "
        "compared (float32, relative error of logits below 5e-5), with a control that bites. "
        "Families with a table of their own (llama, qwen3 ...) use that table; the derived one "
        "stands beside it as a check."
    )
    yield ""
    yield f"| proven | types | {' | '.join(COLUMNS)} |"
    yield "|---|---:|" + "---:|" * len(COLUMNS)
    for kind, members in of_kind.items():
        usable = [entry for entry in members if not entry.get("failed", "").startswith("config")]
        counts = [
            sum(any(proven(entry, option) for option in options) for entry in members)
            for options in COLUMNS.values()
        ]
        title = TITLES.get(kind, kind)
        yield f"| {title} | {len(usable)} | {' | '.join(map(str, counts))} |"
    yield ""
    yield from counted_on_lists({entry["model_type"]: entry for entry in entries}, builds)
    for kind, members in of_kind.items():
        yield ""
        yield f"## {TITLES.get(kind, kind)}"
        yield ""
        yield f"| model type | {' | '.join(OPTIONS.values())} | why not |"
        yield "|---|" + ":-:|" * len(OPTIONS) + "---|"
        yield from map(_row, members)


def _row(entry: dict[str, Any]) -> str:
    """A type's line of the coverage page."""
    marks = ["yes" if proven(entry, option) else "" for option in OPTIONS]
    reasons = [entry["failed"]] if "failed" in entry else []
    for option in REASONS:
        why = entry.get("operators", {}).get(option, {}).get("why")
        if why:
            reasons.append(f"{option}: {why}")
    text = "; ".join(map(_cell, reasons))
    return f"| `{entry['model_type']}` | {' | '.join(marks)} | {text} |"


def _cell(reason: str) -> str:
    """A reason on the page, which the report has in full."""
    return shorten(reason, 160, placeholder=" ...").replace("|", "\\|").replace("<", "\\<")


def main() -> int:
    """Entry point; the exit code is 0 even where some types cannot be derived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the tables")
    parser.add_argument("--report", type=Path, help="report.json; default: beside the tables")
    parser.add_argument("--seconds", type=int, default=1800, help="of CPU time, limit a type")
    parser.add_argument("--memory", type=int, default=12 << 30, help="bytes a type may address")
    parser.add_argument(
        "--again",
        choices=("missing", "unproven", "old"),
        default="missing",
        help="what of the report is derived again, where an older state of the code made it",
    )
    parser.add_argument("--markdown", action="store_true", help="print the coverage page")
    parser.add_argument(
        "--builds",
        action="store_true",
        help="try which types without a proof can be built at all: builds.json beside the report",
    )
    parser.add_argument("--kind", choices=sorted(KINDS), help="only types of this kind")
    parser.add_argument("types", nargs="*", help="model types; default: all, of --kind")
    given = parser.parse_args()
    report = given.report or given.out.parent / "derived_report.json"
    builds = report.with_name("builds.json")
    if given.builds:
        known = json.loads(report.read_text())
        write_whole(builds, json.dumps(what_builds(known), indent=1, sort_keys=True) + "\n")
        return 0
    if given.markdown:
        entries = list(json.loads(report.read_text()).values())
        named = {path.name: path for path in given.out.glob("*.json")}
        tables = [named[e["table"]] for e in entries if e.get("table") in named]
        versions = sorted({json.loads(path.read_text())["transformers"] for path in tables})
        made = json.loads(builds.read_text()) if builds.is_file() else {}
        print("\n".join(markdown(entries, f"transformers {', '.join(versions)}", made)))
        return 0
    every = [name for name, (kind, _) in model_types().items() if given.kind in (None, kind)]
    run_all(
        given.out,
        report,
        given.types or sorted(every),
        seconds=given.seconds,
        memory=given.memory,
        again=given.again,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
