"""Run a model that does not fit in memory: each part is read when it runs, then dropped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from growkit.core.errors import UsageError
from growkit.verification.loading import (
    check_complete,
    load_error,
    quiet_transformers,
    read_config,
    register_own_models,
)
from growkit.verification.written_folder import Folder


class LayerwiseModel:
    """A causal language model whose weights live on disk.

    The model's own forward runs, unchanged; hooks read each part (embeddings, one decoder layer,
    final norm, output head) right before it and drop it right after. ``peak_elements`` is the
    largest number of weights that were in memory at once.

    Args:
        model: the model with its parameters on the meta device and its buffers real (rotary
            frequencies are computed, not stored: on the meta device they would be garbage).
        folder: where the weights are.
        dtype: dtype of the arithmetic.
    """

    def __init__(self, model: Any, folder: Folder, dtype: torch.dtype) -> None:
        self.model, self.config, self.folder, self.dtype = model, model.config, folder, dtype
        self.live_elements = self.peak_elements = 0
        self._tied = dict(model.all_tied_weights_keys)
        self._check()
        for name, part in self._parts():
            part.register_forward_pre_hook(self._reader(name))
            part.register_forward_hook(self._dropper(name))

    def __call__(self, **arguments: Any) -> Any:
        return self.model(**arguments)

    def named_modules(self) -> Any:
        return self.model.named_modules()

    def _parts(self) -> list[tuple[str, nn.Module]]:
        base = self.model.model
        parts = [("model.embed_tokens", base.embed_tokens)]
        parts += [(f"model.layers.{i}", layer) for i, layer in enumerate(base.layers)]
        return [*parts, ("model.norm", base.norm), ("lm_head", self.model.lm_head)]

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter's values are on disk, following a tie either way."""
        if name in self.folder.tensors:
            return name
        partners = [b if a == name else a for a, b in self._tied.items() if name in (a, b)]
        return next((partner for partner in partners if partner in self.folder.tensors), None)

    def _check(self) -> None:
        state = self.model.state_dict()
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        check_complete(
            self.folder,
            [name for name in shapes if self.stored_name(name) is None],
            [
                name
                for name in self.folder.tensors
                if name not in shapes and not any(re.search(rule, name) for rule in ignored)
            ],
            [
                name
                for name in shapes
                if (stored := self.stored_name(name))
                and self.folder.tensors[stored][2] != tuple(shapes[name])
            ],
        )

    def _reader(self, prefix: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            values: dict[str, torch.Tensor] = {}
            for name in module.state_dict():
                stored = self.stored_name(f"{prefix}.{name}")
                assert stored is not None  # _check has seen to it
                values[name] = _read(self.folder.tensors[stored][0], stored).to(self.dtype)
            module.load_state_dict(values, assign=True)
            self.live_elements += sum(value.numel() for value in values.values())
            self.peak_elements = max(self.peak_elements, self.live_elements)

        return read

    def _dropper(self, prefix: str) -> Any:
        def drop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            state = module.state_dict()
            self.live_elements -= sum(value.numel() for value in state.values())
            empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
            module.load_state_dict(empty, assign=True)

        return drop


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def load_layerwise(
    folder: Folder, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> LayerwiseModel:
    """Open a Llama-like decoder for layer by layer computation.

    Raises:
        UsageError: the model is not ``model.{embed_tokens, layers, norm}`` + ``lm_head``, or its
            module names are not its tensor names.
        CheckpointError: transformers cannot build the model.
        VerificationFailed: tensors are missing, unexpected or of the wrong shape.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    register_own_models()
    with quiet_transformers():
        try:
            config = read_config(folder, trust_remote_code=trust_remote_code)
            if getattr(config, "is_encoder_decoder", False):
                raise UsageError(
                    f"{folder.name!r} is an encoder-decoder, which cannot be run layer by layer.",
                    "Pass --layerwise off on a machine with more memory.",
                )
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except UsageError:
            raise
        except Exception as error:  # whatever transformers objects to, the folder does not load
            raise load_error(folder, error) from error
    base = getattr(model, "model", None)
    wanted = ("embed_tokens", "layers", "norm")
    if not all(hasattr(base, name) for name in wanted) or not hasattr(model, "lm_head"):
        raise UsageError(
            f"{type(model).__name__} of {folder.name!r} cannot be run layer by layer: it is not "
            "made of model.embed_tokens, model.layers, model.norm and lm_head.",
            "Pass --layerwise off on a machine with more memory.",
        )
    covered = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    outside = [name for name in model.state_dict() if not name.startswith(covered)]
    if outside or _is_converted(config):
        reason = (
            f"{outside[0]} lies outside its layers"
            if outside
            else "its tensors are stored under other names than its modules"
        )
        raise UsageError(
            f"{type(model).__name__} of {folder.name!r} cannot be run layer by layer: {reason}.",
            "Pass --layerwise off on a machine with more memory.",
        )
    return LayerwiseModel(model.eval().requires_grad_(False), folder, dtype)


def _is_converted(config: Any) -> bool:
    """transformers rewrites the stored tensors of this model type on loading (mixtures, mostly)."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # older transformers
        return False
    return bool(get_checkpoint_conversion_mapping(config.model_type))
