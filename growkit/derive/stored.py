"""A module seen through the file it is saved as: the same numbers under other names and in other
places.

Many classes store other tensors than they hold (experts one by one, projections fused or split,
transposed). Numbers from 1 on are written into the module's state in float64 and saved; where each
of them turns up in the file is the exact map between the two. All that follows is said of file
tensors, which is what growth reads and writes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from growkit.derive.builder import Builder, Underivable, Values, said_by, token_ids
from growkit.verification.model_inputs import outputs

Arrays = dict[str, npt.NDArray[Any]]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """The numbers a module keeps: parameters and persistent buffers, tied ones once."""
    found: dict[str, torch.Tensor] = {}
    places = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and value.numel() and value.data_ptr() not in places:
            places.add(value.data_ptr())
            found[name] = value
    return found


def saved(model: Any) -> Arrays:
    """The tensors of the file that ``save_pretrained`` writes."""
    folder = tempfile.mkdtemp(prefix="growkit-derive-")
    try:
        model.save_pretrained(folder, max_shard_size="100GB")
        return dict(load_file(Path(folder) / "model.safetensors"))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Underivable(f"The class cannot save itself ({said_by(error)}).") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class StoredModel:
    """A model whose numbers are read and written as those of its file.

    Attributes:
        model: the module, in float32.
        shapes: of every tensor of the file.
        opaque: names of file tensors that are no floating-point state of the module.
        unread: parameters of the module that the file does not hold.
    """

    def __init__(self, builder: Builder, values: Values) -> None:
        self.builder, self.values = builder, values
        self.model: Any = builder.build(values)
        self.state = state_of(self.model)
        # Tables that the class computes and does not save (sinusoidal positions of Marian).
        self.constant = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        starts, total = {}, 0
        for name, value in self.state.items():
            starts[name] = total
            total += value.numel()
        self._starts, self._total = starts, total
        self._index, self.opaque, self.shapes = self._numbered()
        held = np.zeros(total + 1, bool)
        for index in self._index.values():
            held[index.reshape(-1) + 1] = True
        self.unread = [
            name
            for name, start in starts.items()
            if name not in self.constant
            and not held[start + 1 : start + 1 + self.state[name].numel()].all()
        ]

    def _numbered(self) -> tuple[Arrays, Arrays, dict[str, tuple[int, ...]]]:
        """File tensor -> flat position of each entry in the module's state."""
        twin = self.builder.build(self.values).double()
        state = twin.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, start in self._starts.items():
                value = state[name]
                numbers = torch.arange(1, value.numel() + 1, dtype=torch.float64) + start
                value.copy_(numbers.reshape(value.shape))
        index: Arrays = {}
        opaque: Arrays = {}
        shapes = {}
        for name, array in saved(twin).items():
            shapes[name] = tuple(array.shape)
            whole = array.dtype == np.float64 and (array == np.rint(array)).all()
            if not array.size:
                opaque[name] = array
            elif whole and array.min() >= 1 and array.max() <= self._total:
                index[name] = array.astype(np.int64) - 1
            elif array.dtype == np.float64:
                raise Underivable(f"The file holds other numbers than the module: {name!r}.")
            else:
                opaque[name] = array
        return index, opaque, shapes

    def parameter_of(self, name: str) -> str:
        """The part of the module's state that the first entry of a file tensor is in."""
        first = int(self._index[name].reshape(-1)[0])
        return [part for part, start in self._starts.items() if start <= first][-1]

    def read(self) -> Arrays:
        """The file's tensors in float32."""
        return self._gathered({name: value.detach() for name, value in self.state.items()})

    def _gathered(self, parts: Mapping[str, torch.Tensor]) -> Arrays:
        flat = np.concatenate([parts[name].reshape(-1).numpy() for name in self._starts])
        return {name: np.asarray(flat[index]) for name, index in self._index.items()}

    def write(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Set the module's state to these file tensors (some, or all of them)."""
        flat = torch.cat([value.detach().reshape(-1) for value in self.state.values()])
        for name, array in tensors.items():
            if name in self._index:
                place = torch.from_numpy(self._index[name].reshape(-1))
                flat[place] = torch.from_numpy(np.ascontiguousarray(array).reshape(-1)).float()
        with torch.no_grad():
            for name, start in self._starts.items():
                value = self.state[name]
                value.copy_(flat[start : start + value.numel()].reshape(value.shape))

    def logits(self, seed: int = 0, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [2, 12, vocabulary] of fixed token ids, or of others."""
        tokens = token_ids(self.model, seed) if tokens is None else tokens
        with torch.no_grad():
            return outputs(self.model, tokens).float()

    def gradients(self, seed: int = 0, *, order: list[str] | None = None) -> Arrays:
        """Gradient of a random sum of logits by every file tensor; zero where it has none.

        Args:
            seed: of tokens and sum.
            order: gets the names of the module's parameters in the order of the forward pass.
        """
        parameters = [
            value
            for name, value in self.state.items()
            if isinstance(value, torch.nn.Parameter) and name not in self.constant
        ]
        names = {id(value): name for name, value in self.state.items()}
        hooks = []
        for value in parameters:
            value.grad = None
            value.requires_grad_(True)
            if order is not None:
                hooks.append(
                    value.register_post_accumulate_grad_hook(
                        lambda done: order.insert(0, names[id(done)])
                    )
                )
        logits = outputs(self.model, token_ids(self.model, seed)).float()
        generator = torch.Generator().manual_seed(seed + 100)
        (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
        for hook in hooks:
            hook.remove()
        return self._gathered(
            {
                name: torch.zeros_like(value) if value.grad is None else value.grad.detach()
                for name, value in self.state.items()
            }
        )

    def randomise(self, seed: int = 0) -> Arrays:
        """Weights of a size that makes every part count, biases and gains that are not 0 and 1.

        Returns:
            The file's tensors, which the module holds from now on.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in self.state.items():
                if not isinstance(value, torch.nn.Parameter) or name in self.constant:
                    continue
                noise = torch.randn(value.shape, generator=generator)
                if value.dim() < 2 or not torch.isfinite(value).all():
                    flat, first = value.reshape(-1), abs(float(value.reshape(-1)[0]))
                    stated = 0.01 <= first < 0.1 and bool((flat == flat[0]).all())
                    size = first / 2 if stated else 0.1  # numbers that the class multiplies up
                    value.copy_(torch.nan_to_num(value) + size * noise)
                elif value.std() > 0.3:  # an embedding, or a table with a meaning of its own
                    value.add_(0.05 * noise)
                else:
                    value.copy_(noise / min(value.shape[-2:]) ** 0.5)
        return self.read()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a part of the largest number."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.double() - wanted.double()).abs().max()
    error = float(difference / wanted.double().abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
