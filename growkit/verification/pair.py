"""The two folders of a comparison, how they are run, and how far rounding may take them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import __version__ as transformers_version

from growkit.core.errors import CheckpointError, UsageError, VerificationFailed
from growkit.verification import affordable as memory
from growkit.verification import layers, loading
from growkit.verification import model_inputs as inputs
from growkit.verification.amplification import (
    OWN_FACTOR,
    STORED_FACTOR,
    own_rounding,
    stored_rounding,
)
from growkit.verification.layerwise import load_layerwise
from growkit.verification.shared_layers import SharedLayers
from growkit.verification.tolerance import root_mean_square, tolerance
from growkit.verification.vocabulary_view import VocabularyView
from growkit.verification.written_folder import Folder


@dataclass
class Pair:
    """Folders A and B, their loaded models, and the rule of the comparison.

    Attributes:
        compute: dtype of the arithmetic.
        layerwise: the models are read layer by layer.
        rounded: the plan rounded weights on writing.
        preserves: the plan promises the same function.
        given: the tolerance that the user gave, in logits.
        sample: the windows on which amplification is measured.
        view: the tokens that both have, where their vocabularies differ; models are loaded so that
            they know these alone.
        shared: what the loaded models have in common.
        first: logits of ``a`` and ``b`` on the first of the windows, unless they are very large.
    """

    a: Folder
    b: Folder
    compute: torch.dtype
    layerwise: bool
    trust_remote_code: bool
    rounded: bool
    preserves: bool = True
    given: float | None = None
    sample: Sequence[torch.Tensor] = ()
    notes: list[str] = field(default_factory=list)
    model_a: Any = None
    model_b: Any = None
    view: VocabularyView | None = None
    shared: SharedLayers = field(default_factory=SharedLayers)
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    _factors: dict[str, float] = field(default_factory=dict)

    def load(self, folder: Folder, dtype: torch.dtype) -> Any:
        """A folder's model."""
        load = load_layerwise if self.layerwise else loading.load_model
        model = load(folder, dtype, trust_remote_code=self.trust_remote_code)
        if self.view is not None:
            self.view.attach(model, "a" if folder is self.a else "b")
        return model

    def load_both(self) -> None:
        """Fill in the models."""
        self.model_a = self.load(self.a, self.compute)
        self.model_b = self.load(self.b, self.compute)

    def model(self, folder: str) -> Any:
        """``a`` or ``b``."""
        return self.model_a if folder == "a" else self.model_b

    @property
    def depth(self) -> int:
        """Layers of the deeper model."""
        return max(inputs.depth(self.model_a), inputs.depth(self.model_b))

    def allowed(self, scale: float, depth: int | None = None) -> float:
        """The rule between A and B, for logits of root mean square ``scale``.

        ``depth``: layers that the signal passes; absent: those of the deeper model.
        """
        if self.given is not None:
            return self.given
        return tolerance(
            scale,
            self.depth if depth is None else depth,
            self.compute,
            storage=self.b.storage_dtype,
            storage_rounding=self.rounded,
        )

    def allowed_cached(self, folder: str, logits: torch.Tensor) -> float:
        """The rule between one model with a cache and without: weights are the same."""
        if self.given is not None:
            return self.given
        # generate() gives float32 logits at best
        compute = torch.float32 if self.compute == torch.float64 else self.compute
        return tolerance(root_mean_square(logits), inputs.depth(self.model(folder)), compute)

    def amplification(self, folder: str) -> float:
        """By how much the rule is to be widened for a model that amplifies rounding; at least 1.

        Measured once, and only when something exceeds the rule. For B it widens only what B's
        cache is held to.
        """
        if self.given is not None:
            return 1.0
        if folder not in self._factors:
            self._factors[folder] = max(1.0, self._measured(folder))
        return self._factors[folder]

    def _measured(self, which: str) -> float:
        model, folder = self.model(which), self.a if which == "a" else self.b
        logits = torch.cat([self.logits(which, ids) for ids in self.sample])
        scale = root_mean_square(logits)
        reached = 0.0
        available = memory.available_memory()
        if self.compute == torch.float64:
            self.notes.append("amplification of rounding not measured in float64")
        elif folder.config.get("quantization_config"):  # it is de-quantised to 32 bits at most
            self.notes.append("amplification of rounding not measured: the weights are quantised")
        elif not self.layerwise and available and 8 * folder.parameters > 0.9 * available:
            self.notes.append("amplification of rounding not measured: too little memory")
        else:
            reference = self.load(folder, torch.float64)
            try:
                reached += OWN_FACTOR * own_rounding(model, reference, self.sample)
            except RuntimeError as error:  # XLNet makes float32 masks, whatever its weights are
                self.notes.append(
                    "amplification of rounding not measured: "
                    f"{type(model).__name__} does not compute in float64 ({error})"
                )
        if which == "b":
            return reached / self.allowed_cached("b", logits)
        if self.rounded:
            reached += STORED_FACTOR * stored_rounding(model, self.sample, self.b.storage_dtype)
        return reached / self.allowed(scale)

    def logits(self, which: str, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocab]``, without a cache.

        Raises:
            VerificationFailed: some are NaN or infinite.
            CheckpointError: the class raises an error of its own, for any weights.
        """
        model, folder = self.model(which), self.a if which == "a" else self.b
        try:
            logits = inputs.outputs(model, ids)
        except (AttributeError, TypeError, NameError, NotImplementedError) as error:
            raise CheckpointError(
                f"{type(model).__name__} of {folder.name!r} fails in its own forward pass: "
                f"{type(error).__name__}: {error}.",
                "It is no matter of weights: try another transformers than "
                f"{transformers_version}; growkit grow --no-verify writes without the proof.",
            ) from error
        wrong = int((~torch.isfinite(logits)).sum())
        if wrong:
            layer = layers.first_non_finite(model, list(self.sample))
            where = f", from {layer} on" if layer else ""
            raise VerificationFailed(
                f"{wrong} of {logits.numel()} logits of {folder.name} are not finite{where}.",
                "Its weights hold NaN or infinity, or overflow in this compute dtype.",
            )
        return logits


# Growths of the vocabulary, as a plan names them.
VOCABULARY = ("tokenizer", "add_tokens", "vocab")


def common_vocabulary(pair: Pair) -> int:
    """Number of tokens of both models, which are loaded.

    Where the growth that B records changed the vocabulary, the pair gets a view of the common ones,
    which the loaded models are still to be attached to.

    Raises:
        UsageError: they differ, and B records no such growth.
    """
    if not inputs.has_vocabulary(pair.model_a):
        return inputs.BYTES
    configs = [inputs.text_config(model) for model in (pair.model_a, pair.model_b)]
    size_a, size_b = (int(config.vocab_size) for config in configs)
    steps = pair.b.manifest.get("plan", {}).get("operators", ())
    if any(isinstance(step, dict) and step.get("operator") in VOCABULARY for step in steps):
        pair.view = VocabularyView.between(pair.a, pair.b, size_a, size_b, pair.model_a.config)
        return len(pair.view.ids_a)
    if size_a != size_b:
        raise UsageError(
            f"The vocabularies differ: {size_a} and {size_b} tokens.",
            "Only checkpoints with the same vocabulary can be compared.",
        )
    return size_a
