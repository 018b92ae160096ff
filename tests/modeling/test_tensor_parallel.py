"""Two ranks over gloo compute what one process does, gradients of shared parameters included, and
take the same step; sizes that they cannot share are refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from gda_cases import gda_config, scatter_weights
from process_runs import run, script
from transformers.distributed import DistributedConfig
from variant_cases import model_of

from growkit.modeling import GdaForCausalLM


@pytest.mark.skipif(
    "tp_size" not in inspect.signature(DistributedConfig).parameters,
    reason="this transformers has no DistributedConfig(tp_size=)",
)
@pytest.mark.parametrize("case", ["gda", "diff_v2-normed"])
def test_two_ranks_equal_one_process(tmp_path, case):
    if case == "gda":
        config = gda_config((6, 2, 2), "own", implementation="sdpa", vocab_size=64)
        model = scatter_weights(GdaForCausalLM(config))
    else:
        model = model_of(case, vocab_size=64)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {"tokens": tokens, "logits": out.logits.detach(), "gradients": gradients}
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    with torch.no_grad():
        expected["after"] = model(tokens).logits
    torch.save(expected, tmp_path / "expected.pt")

    run(2, [str(Path(__file__).with_name("tensor_parallel_worker.py")), str(tmp_path)], script)
    found = torch.load(tmp_path / "found.pt")
    assert set(gradients) | {"logits", "after a step"} == set(found["errors"])
    assert max(found["errors"].values()) < 1e-5
    # really split: one of two stripes or pairs, one of two key/value groups
    for name in ("q_proj", "k_proj"):
        rows = getattr(model.model.layers[0].self_attn, name).out_features // 2
        assert found["shards"][f"model.layers.0.self_attn.{name}.weight"] == (rows, 32)


class _Ranks:
    tp_size = 4


@pytest.mark.parametrize(
    ("case", "count"),
    [("gda", "2 key/value groups"), ("diff_v1", "2 key/value groups"), ("ffn", "62 FFN units")],
)
def test_sizes_that_ranks_cannot_share(case: str, count: str) -> None:
    """A signal head and what is subtracted from it stay on one rank."""
    if case == "diff_v1":
        config = model_of("diff_v1", vocab_size=64).config
        kind = type(model_of("diff_v1", vocab_size=64))
    else:
        config, kind = gda_config((6, 2, 2), "own", vocab_size=64), GdaForCausalLM
    if case == "ffn":
        config = gda_config((4, 4, 4), "own", vocab_size=64, intermediate_size=62)
    config.distributed_config = _Ranks()
    with pytest.raises(ValueError, match=f"tp_size 4 does not divide the model's {count}"):
        kind(config)
