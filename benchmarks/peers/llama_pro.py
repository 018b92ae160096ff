"""Block expansion the way LLaMA-Factory's script does it: python llama_pro.py SOURCE OUT ADDED

The behaviour of hiyouga/LLaMA-Factory ``scripts/llama_pro.py`` (commit ff6d4d1), written anew on
transformers 5: the config changes in ``num_hidden_layers`` alone, the whole model is loaded, blocks
are copied in memory, ``o_proj`` and ``down_proj`` of the new ones are zero, shards of 2 GB. Its
tokenizer step is left out (the sources here have none). Nothing of growkit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def main(source: str, out: str, added: int) -> None:
    config = AutoConfig.from_pretrained(source)
    layers = config.num_hidden_layers
    config.num_hidden_layers = layers + added
    config.save_pretrained(out)

    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype="auto")
    state, grown = model.state_dict(), {}
    position = 0
    for layer in range(layers):
        inserted = (layer + 1) % (layers // added) == 0
        for copy_number in range(1 + inserted):
            for name, weight in state.items():
                if f".{layer}." not in name:
                    continue
                closed = copy_number and ("o_proj" in name or "down_proj" in name)
                new = torch.zeros_like(weight) if closed else weight.clone()
                grown[name.replace(f".{layer}.", f".{position}.")] = new
            position += 1
    grown |= {name: weight for name, weight in state.items() if ".layers." not in name}

    plan = split_torch_state_dict_into_shards(grown, max_shard_size="2GB")
    for file, names in plan.filename_to_tensors.items():
        part = {name: grown[name].contiguous() for name in names}
        save_file(part, str(Path(out) / file), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (Path(out) / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
