"""Context parallelism: neighbouring processes divide the tokens of every sequence.

Every process embeds, norms and projects its own stretch of a sequence, so that activations are
divided, and attention is given whole sequences for a share of its heads: an all-to-all before it
turns [b, heads, n / N, d] into [b, heads / N, n, d], one behind it turns the output back. That is
DeepSpeed-Ulysses (arXiv:2309.14509). torch's ring attention, which accelerate's
``ParallelismConfig(cp_size=)`` starts, has no kernels for a CPU; DeepSpeed's own class drops SDPA's
masks (of packed documents, of windows) and wants the config's number of heads in every call.

The all-to-all stands in transformers' interfaces of attention and mask functions while a split
sequence is in the model, and nowhere else: any class whose layers call them is served by whichever
kernel it has. :class:`ContextCheck` compares its logits and loss with the undivided ones before the
first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growkit.core.errors import GrowkitError, UsageError
from growkit.data.packing import IGNORED
from growkit.training.parallel.processes import Processes

_MASKS = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
_OTHERWISE = "Leave parallel.context out (parallel.strategy: fsdp divides sequences by number)."
CHECKED = 8  # tokens of a process in the check before the first step


@dataclass(frozen=True)
class WholeMask:
    """Stands for the mask while a sequence is split; ``mask`` is that of the whole sequence.

    It is never None, which a layer may take for leave to attend by itself.
    """

    mask: Any


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension goes to process i, whose own part takes its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, ctx.group), None


def _exchanged(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


def heads_for_tokens(states: list[Tensor], size: int, group: Any) -> list[Tensor]:
    """[b, heads, n / N, d] of all heads -> [b, heads / N, n, d], in one exchange.

    Heads and widths may differ from tensor to tensor.
    """
    # [N, b, n / N, heads / N x d]: side by side, what goes to one process.
    parts = [s.unflatten(1, (size, -1)).permute(1, 0, 3, 2, 4) for s in states]
    shapes = [part.shape[3:] for part in parts]
    packed = torch.cat([part.flatten(3) for part in parts], dim=3)
    exchanged = _Exchange.apply(packed, group)
    whole = exchanged.transpose(0, 1).flatten(1, 2)  # [b, n, ...]
    split = whole.split([shape.numel() for shape in shapes], dim=2)
    return [s.unflatten(2, shape).transpose(1, 2) for s, shape in zip(split, shapes, strict=True)]


def tokens_for_heads(output: Tensor, size: int, group: Any) -> Tensor:
    """[b, n, heads / N, d] -> [b, n / N, heads, d]."""
    exchanged = _Exchange.apply(output.unflatten(1, (size, -1)).transpose(0, 1), group)
    joined: Tensor = exchanged.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return joined


class _WithGroups:
    """An attention layer as its function sees it, with another number of query heads a key."""

    def __init__(self, module: Any, num_key_value_groups: int) -> None:
        self.module, self.num_key_value_groups = module, num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class SplitSequences:
    """This process's place among those that share its sequences."""

    def __init__(self, processes: Processes) -> None:
        self.size, self.place = processes.context, processes.rank % processes.context
        self.group = processes.context_group
        self.positions: Tensor | None = None  # [b, n], of packed documents

    @contextlib.contextmanager
    def applied(self, model: Any, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What this process computes of a batch; forward and backward pass belong inside.

        Args:
            batch: whole sequences, the same in all processes that share them, on their device.

        Yields:
            Their tokens, positions and next tokens (``shift_labels``) of this process; with one
            process the batch as it is.
        """
        if self.size == 1:
            yield batch
            return
        name = model.config.get_text_config()._attn_implementation
        own, self.positions = self.share(batch), batch.get("position_ids")
        attention, mask = (get.get(name) for get in (ALL_ATTENTION_FUNCTIONS, _MASKS))
        if attention is None or mask is None:
            raise UsageError(
                f"Attention {name!r} of {type(model).__name__} cannot be given whole sequences by "
                "parallel.context.",
                "Set model.attn_implementation: sdpa or flash_attention_2, where the class has it. "
                f"{_OTHERWISE}",
            )
        ALL_ATTENTION_FUNCTIONS[name] = self._attention(attention)
        _MASKS[name] = self._mask(mask)
        try:
            yield own
        finally:  # local entries, above those that transformers shares
            del ALL_ATTENTION_FUNCTIONS[name], _MASKS[name]
            self.positions = None

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's tokens of a batch, with the positions that they have in the whole."""
        ids = batch["input_ids"]
        length = ids.shape[1] // self.size
        stretch = slice(self.place * length, (self.place + 1) * length)
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        own = {
            "input_ids": ids[:, stretch],
            "position_ids": positions[:, stretch],
            # Keeps transformers from looking for documents in a stretch; the mask knows them.
            "attention_mask": torch.ones_like(ids[:, stretch]),
        }
        if "labels" in batch:
            # Shifted before they are cut: a stretch predicts the next one's first.
            following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            own["labels"] = own["shift_labels"] = following[:, stretch].contiguous()
        return own

    def _mask(self, inner: Callable[..., Any]) -> Callable[..., WholeMask]:
        """The mask function of a kernel, for whole sequences, with the documents in them."""

        def whole_mask(
            batch_size: int,
            q_length: int,
            kv_length: int,
            mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
            attention_mask: Any = None,
            **named: Any,
        ) -> WholeMask:
            positions = self.positions
            documents = None
            if positions is not None:
                documents = masking_utils.find_packed_sequence_indices(positions)
            if positions is not None and documents is not None:
                remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
                inside = mask_function if remap is None else remap(mask_function, positions)
                of_documents = masking_utils.packed_sequence_mask_function(documents)
                mask_function = masking_utils.and_masks(of_documents, inside)
                named["allow_is_causal_skip"] = False
            return WholeMask(
                inner(
                    batch_size=batch_size,
                    q_length=q_length * self.size,
                    kv_length=kv_length * self.size,
                    mask_function=mask_function,
                    attention_mask=None,
                    **named,
                )
            )

        return whole_mask

    def _attention(self, inner: Callable[..., Any]) -> Callable[..., tuple[Tensor, Any]]:
        """The attention function of a kernel between two exchanges."""

        def attention(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            *arguments: Any,
            **named: Any,
        ) -> tuple[Tensor, Any]:
            if not isinstance(attention_mask, WholeMask):
                raise TypeError("the class makes masks of its own")
            heads, keys = query.shape[1], key.shape[1]
            if heads % self.size:
                raise UsageError(
                    f"parallel.context {self.size} does not divide the {heads} query heads that "
                    f"{type(getattr(module, 'module', module)).__name__} attends with at once.",
                    "Set parallel.context to a divisor of them, or grow the heads to a multiple.",
                )
            if keys % self.size:  # few keys: as many copies as make a number that can be shared
                groups = heads // keys
                fitting = (n for n in range(2, groups + 1) if groups % n == 0)
                copies = next(n for n in fitting if keys * n % self.size == 0)
                key, value = (s.repeat_interleave(copies, dim=1) for s in (key, value))
                module = _WithGroups(module, groups // copies)
            query, key, value = heads_for_tokens([query, key, value], self.size, self.group)
            if "position_ids" in named:
                named["position_ids"] = self.positions
            output, maps = inner(
                module, query, key, value, attention_mask.mask, *arguments, **named
            )
            return tokens_for_heads(output, self.size, self.group), maps

        return attention


class ContextCheck(TrainerCallback):
    """Does a model compute the same of split sequences? Asked of itself before the first step.

    Linear attention, convolutions over tokens, masks or attention of its own, rotary scaling by the
    length of a text: all that looks at other tokens without transformers' interface would see one
    stretch only, in silence.

    Args:
        length: of the run's sequences. Positions reach up to it, where rotary scaling looks.
        after: called behind the check; sharded layers are to be given back.
    """

    def __init__(
        self, split: SplitSequences, processes: Processes, length: int, after: Callable[[], None]
    ) -> None:
        self.split, self.processes, self.length, self.after = split, processes, length, after

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        model = objects["model"]
        # In float32 where the kernel can: a difference is then no rounding.
        flash = "flash" in str(model.config.get_text_config()._attn_implementation)
        training = model.training
        model.eval()
        try:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=flash and args.bf16):
                for batch in self._batches(model):
                    self._compare(model, batch)
        finally:
            model.train(training)
            self.after()

    def _batches(self, model: Any) -> Iterator[dict[str, Tensor]]:
        """One text; and three documents, two that meet inside a stretch, the last far behind."""
        count = min(CHECKED * self.split.size, self.length)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(count, device=model.device) * 7 % vocabulary)[None]
        yield {"input_ids": ids, "labels": ids}
        first, far = count // 2 - count // 8 - 1, min(3, count // self.split.size - 1)
        sizes = (first, count - first - far, far)
        positions = torch.cat([torch.arange(size) for size in sizes])
        positions[count - far :] += self.length - far
        yield {"input_ids": ids, "labels": ids, "position_ids": positions.to(model.device)[None]}

    @torch.no_grad()
    def _compare(self, model: Any, batch: dict[str, Tensor]) -> None:
        split, count = self.split, batch["input_ids"].numel()
        whole = model(**batch, use_cache=False)
        stretch = slice(split.place * count // split.size, (split.place + 1) * count // split.size)
        expected = whole.logits[:, stretch].float()
        eps = torch.finfo(whole.logits.dtype).eps
        limit = (64 if eps < 1e-4 else 8) * eps
        cause = ""
        try:
            with split.applied(model, batch) as own:
                found = model(**own, num_items_in_batch=count - 1, use_cache=False)
        except UsageError:
            raise
        except Exception as error:  # whatever the class objects to
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            distance = float((found.logits.float() - expected).norm() / expected.norm())
            if not distance <= limit:
                cause = f"its logits are off by {distance:.1e} of their size"
        causes = [other for other in self.processes.gather(cause) if other]
        if causes:  # the first stretch sees no other, and may be right where the rest is not
            raise GrowkitError(
                f"{type(model).__name__} does not compute the same of a sequence that "
                f"parallel.context splits ({causes[0]}).",
                "Its layers look at other tokens, or at the length of a text, by ways of their "
                f"own. {_OTHERWISE}",
            )
        # A stretch has its share of the sum over the tokens of all.
        loss = self.processes.sum([float(found.loss)])[0] / self.processes.readers
        if abs(loss - float(whole.loss)) > max(limit, 1e-5) * abs(float(whole.loss)):
            raise GrowkitError(
                f"{type(model).__name__} has a loss of {float(whole.loss):.6g}, and of sequences "
                f"that parallel.context splits {loss:.6g}.",
                f"The class does not read next tokens (shift_labels) as given. {_OTHERWISE}",
            )
