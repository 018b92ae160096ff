"""FLOPs that are counted from shapes, against those that torch counts while the model runs.

Our count is 2 for every weight that a token meets and, for attention, scores and values of the
positions that a causal token sees: half of the context on average. What is different in torch's:

* ``eager`` attention computes the whole square and masks half of it away, so torch counts the other
  half too; a kernel that skips masked blocks comes near to our count.
* torch counts matrix products alone: no gains of norms and no biases, for which we count a product
  and a sum each (:func:`vectors`; 1 % of these tiny models, a ten-thousandth of real ones).
* torch counts the table of rotation angles as a product of width 1, which we leave out: the last
  thousandth.

Neither counts softmax, the sums of squares in norms, activations, and what the variants do between
maps and values (differences of maps, gates).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checkpoints import class_config, family_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from variant_checkpoints import variant_config

from growkit.families import family_of
from growkit.modeling import GdaConfig, GdaForCausalLM, GrowkitForCausalLM
from growkit.record.cost import cost_of, training_flops

LENGTH, BATCH = 48, 2
TOKENS = LENGTH * BATCH
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def llama_like(family: str, **changes: Any) -> PreTrainedModel:
    config = class_config(family_config(family, **SIZES, **changes))
    # torch sees no products inside a grouped kernel.
    experts = {"experts_implementation": "eager"} if family == "mixtral" else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **experts)


def gda(**changes: Any) -> PreTrainedModel:
    heads = {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 4}
    fields = {"vocab_size": 256, "num_hidden_layers": 3, **heads, **SIZES, **changes}
    return GdaForCausalLM(GdaConfig(attn_implementation="eager", **fields))


def variant(name: str, **changes: Any) -> PreTrainedModel:
    config = variant_config(name, attn_implementation="eager", **SIZES, **changes)
    return GrowkitForCausalLM(config)


MODELS = {
    "llama": lambda: llama_like("llama"),
    "llama-tied": lambda: llama_like("llama", tie_word_embeddings=True),
    "qwen3": lambda: llama_like("qwen3"),
    "mixtral": lambda: llama_like("mixtral", sliding_window=None),
    "gda": gda,
    "gda-tied": lambda: gda(tie_word_embeddings=True),
    "gqa": lambda: variant("gqa"),
    "diff_v1": lambda: variant("diff_v1"),
    "diff_v2": lambda: variant("diff_v2"),
    "gda_gated": lambda: variant("gda_gated"),
}


def counted(model: PreTrainedModel) -> tuple[int, int]:
    """FLOPs of matrix products that torch sees: of a forward pass, and with the backward pass."""
    torch.manual_seed(0)
    ids = torch.randint(3, 250, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids, labels=ids).loss.backward()
    return forward.get_total_flops(), both.get_total_flops()


def vectors(model: PreTrainedModel) -> int:
    """FLOPs that we count for gains and biases, per token."""
    return 2 * sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)


def declared(model: PreTrainedModel, context: int) -> tuple[int, float]:
    """Our count of a forward pass, and what full squares of attention cost beyond it, per token."""
    config = model.config.to_dict()
    family = family_of(config)
    sizes = family.sizes(config)
    cost = cost_of(family, sizes, "F32", context, config)
    masked = 0.5 * family.attention_flops(sizes) * context * sizes["layer"]
    return cost.flops_per_token, masked


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_what_torch_counts(name: str) -> None:
    model = MODELS[name]()
    forward, both = counted(model)
    flops, masked = declared(model, LENGTH)
    ours = flops + masked - vectors(model)
    assert ours == pytest.approx(forward / TOKENS, rel=1e-3)
    assert training_flops(ours) == pytest.approx(both / TOKENS, rel=1e-3)
    # As it is used, without either correction, it is near for the sizes of a study's models; the
    # part that is masked is what is left out.
    assert flops == pytest.approx(forward / TOKENS - masked, rel=0.015)
    assert masked > 0.02 * flops


def test_attention_is_counted_and_not_a_constant() -> None:
    """Negative control: the count of another length, or of other heads, is seen to be wrong."""
    model = gda()
    forward, _ = counted(model)
    right = sum(declared(model, LENGTH)) - vectors(model)
    assert right == pytest.approx(forward / TOKENS, rel=1e-3)
    for wrong, length in ((model, LENGTH + 8), (gda(num_noise_heads=4), LENGTH)):
        assert sum(declared(wrong, length)) - vectors(wrong) != pytest.approx(
            forward / TOKENS, rel=5e-3
        )


def test_experts_that_a_token_does_not_meet_cost_nothing() -> None:
    """Twice as many active experts cost more, in both counts by the same."""
    models = [
        llama_like("mixtral", sliding_window=None, num_experts_per_tok=experts)
        for experts in (2, 4)
    ]
    two, four = (declared(model, LENGTH)[0] for model in models)
    torch_two, torch_four = (counted(model)[0] / TOKENS for model in models)
    assert four - two == pytest.approx(torch_four - torch_two, rel=1e-9) and four > two
