"""What it costs to keep packed documents apart: dense masks, and attention document by document.

    python benchmarks/document_masks.py --json benchmarks/results/document-masks.json

Forward and backward of a Llama of 1 M parameters (4 layers, 4 heads of 32) on the CPU with one
thread, float32. Three ways in turn within every round: documents joined (no mask), SDPA under
transformers' dense mask, and growkit.training.document_attention. Lengths of documents are
exponential. A figure is the least CPU time of the rounds over that of "joined"; ``--piece`` sets
what short documents share a call.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine
from transformers import AutoModelForCausalLM, LlamaConfig

from growkit.training import document_attention

TOKENS = 4096  # of a step, in sequences of the length measured


def positions_of(rows: int, length: int, mean: int) -> torch.Tensor:
    """Positions that restart at documents of ``mean`` tokens on average; [rows, length]."""
    found = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            row += range(int(torch.empty(1).exponential_(1 / mean)) + 2)
        found.append(row[:length])
    return torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--documents", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--piece", type=int, default=document_attention.PIECE)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    document_attention.PIECE = options.piece
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=257, use_cache=False, tie_word_embeddings=True,
            max_position_embeddings=max(options.lengths),
        )
    )  # fmt: skip
    report: dict[str, Any] = {
        "machine": machine(), "threads": options.threads, "piece": options.piece, "rows": []
    }  # fmt: skip
    for length in options.lengths:
        for mean in options.documents:
            positions = positions_of(max(1, TOKENS // length), length, mean)
            ids = torch.randint(0, 257, positions.shape)
            seconds: dict[str, list[float]] = {"joined": [], "dense": [], "by document": []}
            for number in range(options.rounds + 1):
                for way, taken in seconds.items():
                    by_document = way == "by document"
                    model.set_attn_implementation(
                        document_attention.NAME if by_document else "sdpa"
                    )
                    start = time.process_time()
                    model(
                        input_ids=ids, labels=ids,
                        position_ids=None if way == "joined" else positions,
                    ).loss.backward()  # fmt: skip
                    if number:  # the first round warms up
                        taken.append(time.process_time() - start)
            least = {way: min(taken) for way, taken in seconds.items()}
            row = {"tokens": length, "mean document": mean, "joined, CPU s": least["joined"]} | {
                f"{way} / joined": round(least[way] / least["joined"], 3)
                for way in ("dense", "by document")
            }
            report["rows"].append(row)
            print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
