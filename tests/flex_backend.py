"""flex_attention where torch has no kernel for it: its definition, uncompiled, gradients too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from transformers import masking_utils
from transformers.integrations.flex_attention import WrappedFlexAttention

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="flex_attention compiles C++ on the CPU"
)


def backward_refusal() -> str | None:
    """Why flex_attention cannot be trained through on the CPU, in torch's words; None: it can."""
    states = torch.zeros(1, 1, 4, 8, requires_grad=True)
    try:
        flex.flex_attention(states, states, states).sum().backward()
    except NotImplementedError as error:
        return f"torch {torch.__version__}: {error}"
    return None


@contextmanager
def uncompiled() -> Iterator[None]:
    """What transformers compiles runs as torch defines it, and may be differentiated.

    Compiling takes 10 to 20 s a shape of call on a CPU (block masks, which transformers compiles
    too, some seconds each), and after eight shapes torch goes on uncompiled by itself. Its eager
    definition has a backward pass; the guard against one on the CPU stands before it.
    """

    def block_mask(*arguments: Any, **options: Any) -> flex.BlockMask:
        return flex.create_block_mask(*arguments, **{**options, "_compile": False})

    with (
        mock.patch.object(masking_utils, "create_block_mask", block_mask),
        mock.patch.object(WrappedFlexAttention, "__call__", lambda self: flex.flex_attention),
        mock.patch.object(flex, "_validate_device", lambda *tensors: None),
    ):
        yield
