"""A folder is served without growkit: with every cache of transformers, and as vLLM asks."""

from __future__ import annotations

import ast
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from family_counts import kv_elements
from gda_cases import FORM_IDS, FORMS, gda_config, scatter_weights
from made_once import made_once
from test_modeling_gda import greedy, tokens
from torch import nn
from transformers import AutoModel, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from variant_cases import CASES, TWO_CALLS, config_of, model_of
from vllm_demands import attention_calls, linear_layers_are_only_called, scale_of
from without_growkit import run_without_growkit

from growkit.converting import convert_checkpoint
from growkit.modeling import GdaForCausalLM
from growkit.variants.attentions import VARIANTS
from growkit.variants.gda.attention import GdaAttention
from growkit.variants.request import ConversionRequest
from growkit.variants.wgqa.attention import WeightedGroupedQueryAttention

TESTS = Path(__file__).resolve().parents[1]
SERVER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
sys.path.append(sys.argv[1])
from vllm_demands import unmet

NEW = 8
rows = [[5, 9, 3, 8, 7, 11], [4, 2, 6], [33]]
width = max(map(len, rows))
ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
report = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def tokens(ids, mask, **options):
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist()

    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=width + NEW)
    alone = [torch.tensor([row]) for row in rows]
    report[folder] = {
        "none": tokens(ids, mask, use_cache=False),
        "dynamic": tokens(ids, mask, past_key_values=dynamic),
        "static": tokens(ids, mask, past_key_values=static, disable_compile=True),
        "alone": [tokens(row, torch.ones_like(row))[0] for row in alone],
        "padding ignored": tokens(ids, torch.ones_like(mask)),
        "cached": [[list(part.shape) for part in (layer.keys, layer.values)]
                   for cache in (dynamic, static) for layer in cache.layers],
        "module": type(model).__module__,
        "unmet": unmet(folder),
    }
try:
    import growkit
except ImportError:
    print("REPORT" + json.dumps(report))
"""


def grown_folder(root: Path) -> Path:
    """Llama -> GDA 3:1 -> signal heads x2, written by growkit and never loaded by it."""
    source = tiny.make_folder(root / "llama", tiny.llama_config(heads=6, kv=2))
    request = ConversionRequest(to="gda", ratio=3)
    convert_checkpoint(source, root / "converted", request, verify=False)
    tiny.grow(root / "converted", root / "grown", signal_heads="x2")
    return root / "grown"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Name -> (folder, what a process without growkit made of it)."""

    def serve(root: Path) -> dict[str, Any]:
        folders = {"grown": grown_folder(root)}
        for name, (keys, norm) in zip(FORM_IDS, FORMS, strict=True):
            folders[f"gda-{name}"] = root / f"gda-{name}"
            model = GdaForCausalLM(gda_config((6, 2, 2), keys, norm, "sdpa"))
            scatter_weights(model).save_pretrained(folders[f"gda-{name}"])
        for case in CASES:
            folders[case] = root / case
            model_of(case).save_pretrained(folders[case])
        (root / "cache").mkdir()
        stdout = run_without_growkit(SERVER, TESTS, *folders.values(), cache=root / "cache")
        report = json.loads(stdout.split("REPORT", 1)[1])
        return {name: [str(folder), report[str(folder)]] for name, folder in folders.items()}

    _, found = made_once(tmp_path_factory, "served", serve)
    return {name: (Path(folder), report) for name, (folder, report) in found.items()}


GDA = [f"gda-{name}" for name in FORM_IDS]
EVERY = pytest.mark.parametrize("name", ["grown", *GDA, *CASES])


@EVERY
def test_every_cache_gives_the_tokens_of_no_cache(served, name):
    report = served[name][1]
    assert report["module"].startswith("transformers_modules.")
    assert report["dynamic"] == report["none"]
    assert report["static"] == report["none"]
    assert len({token for row in report["none"] for token in row}) > 3, (
        "the same token again and again shows nothing"
    )


@EVERY
def test_left_padding_changes_no_token(served, name):
    report = served[name][1]
    assert report["alone"] == report["dynamic"]
    assert report["padding ignored"] != report["dynamic"]


@EVERY
def test_caches_hold_what_the_config_counts(served, name):
    """Own keys too: k1, k2 and v1, v2 are ordinary heads of width d, as many keys as values."""
    folder, report = served[name]
    config = json.loads((folder / "config.json").read_text())
    made = GdaForCausalLM if config["model_type"] == "gda" else None
    config = (made.config_class if made else type(config_of("gqa")))(**config)
    for keys, values in report["cached"]:
        assert keys[:3] == values[:3]
        elements = keys[1] * (keys[3] + values[3])
        assert elements == kv_elements(config)
    lengths = {keys[2] for keys, _ in report["cached"]}
    assert lengths == {13, 14}, "dynamic: all but the last token; static: as much as was asked for"


def test_control_a_cache_that_forgets_is_seen():
    class Forgetful(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values * (torch.arange(values.shape[2]) > 4)[:, None]

    model = model_of("gqa")
    cache = Forgetful(config=model.config)
    plain = greedy(model, tokens(), use_cache=False)
    assert not torch.equal(greedy(model, tokens(), past_key_values=cache), plain)


# -- vLLM ------------------------------------------------------------------------------------------

TWO = ["head counts and widths of the config", "one attention call in forward"]
NOT_SERVED = (
    {name: TWO for name in GDA if "own" in name}
    | dict.fromkeys(TWO_CALLS, TWO)
    # H' simulated heads of width D', where the config counts H heads of width d
    | {case: TWO[:1] for case in CASES if case.startswith("sas")}
)


@EVERY
def test_vllm_finds_what_it_asks_for_or_we_know_why_not(served, name):
    assert served[name][1]["unmet"] == NOT_SERVED.get(name, [])


@pytest.mark.parametrize("name", [*GDA, *CASES])
def test_an_engine_is_refused_where_it_would_fail_or_compute_something_else(name):
    """Engines build the model with an attention function of their name."""
    ALL_ATTENTION_FUNCTIONS.register("vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    if name in CASES:
        config: Any = config_of(name, "vllm")
    else:
        config = gda_config((6, 2, 2), *FORMS[GDA.index(name)], "vllm")
    build = partial(AutoModel.from_config, config)
    if name not in NOT_SERVED:
        build()
        return
    with pytest.raises(ValueError, match=r"vllm cannot serve this model: .*growkit convert"):
        build()


def test_control_a_projection_that_is_read_is_seen(monkeypatch):
    """WGQA on ordinary linear layers, whose weights an engine packs or splits."""
    assert linear_layers_are_only_called(model_of("wgqa").model)
    monkeypatch.setattr(WeightedGroupedQueryAttention, "key_value_class", nn.Linear)
    assert not linear_layers_are_only_called(model_of("wgqa").model)


def test_docs_say_what_serves_where():
    text = (TESTS.parent / "docs" / "serving.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| (yes|no)", text, re.MULTILINE)
    assert {name for name, _ in rows} == {"gda", *VARIANTS}
    by_name: dict[str, set[bool]] = {name: set() for name, _ in rows}
    for name in [*GDA, *CASES]:
        by_name[name.split("-")[0] if name.split("-")[0] in by_name else "gqa"].add(
            name not in NOT_SERVED
        )
    assert {(name, served == "yes") for name, served in rows} == {
        (name, value) for name, values in by_name.items() for value in values
    }


def test_control_the_check_sees_what_vllm_would_not_find():
    """Two calls, a call of another name, a scale that is no attribute."""
    assert len(attention_calls(GdaAttention._attend)) == 1, "in a comprehension, outside forward"
    assert attention_calls(GdaAttention.forward) == []
    module = config_of("gqa").variant(config_of("gqa"), 0)
    call = attention_calls(type(module).forward)[0]
    assert scale_of(call, module) == module.scaling
    for keyword in call.keywords:
        if keyword.arg == "scaling":
            keyword.value = ast.parse("self.scaling * 2", mode="eval").body
    assert scale_of(call, module) is None
