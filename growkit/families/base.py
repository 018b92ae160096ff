"""What a family table is made of: tensors with named axes, links between heads, config fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError, nearest
from growkit.families.head_dim_rules import PLAIN_ROTARY, HeadDimRule
from growkit.families.unit_layout import IntArray, Layout, Sizes
from growkit.families.wrapped import explain_tensors

Config = Mapping[str, Any]
LayerRule = Callable[[Config, int], list[Any]]


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor.

    Attributes:
        layout: its units, from the sizes.
        consumes: False when the tensor *produces* these units (copies are plain copies), True when
            it *reads* them (copies share the weight).
        normed: gain or bias of a norm over these units: it produces them, but does not write them
            to the residual stream.
        keys: (axis, part) of the units that are attention keys: the other factor of a score.
    """

    layout: Layout
    consumes: bool = False
    normed: bool = False
    keys: tuple[tuple[str, int], ...] = ()


def produces(layout: Layout, *, keys: tuple[tuple[str, int], ...] = ()) -> Dim:
    """Rows of a projection, a bias: a copied unit copies its entries."""
    return Dim(layout, keys=keys)


def normalises(layout: Layout) -> Dim:
    """Gain or bias of a norm over an axis."""
    return Dim(layout, normed=True)


def consumes(layout: Layout) -> Dim:
    """Columns that read an axis: the copies of a unit share its entries."""
    return Dim(layout, consumes=True)


def always(sizes: Sizes) -> bool:
    """The tensor exists in every checkpoint of the family."""
    return True


def once(sizes: Sizes) -> int:
    """A token meets every weight once."""
    return 1


_BEHIND = re.compile(r"\{layers\+(\d+)\}")


def behind_the_last(places: int) -> str:
    """Stands in a name for the number of a layer that would be so many places behind the last."""
    return f"{{layers+{places}}}"


def every_layer(sizes: Sizes, layer: int) -> bool:
    """Every layer has the tensor."""
    return True


@dataclass(frozen=True)
class Tensor:
    """One tensor; one a layer of its stack with ``{layer}`` in the name, one an expert with
    ``{expert}``.

    Attributes:
        role: what it is, the same word in every family, so that formats can be mapped.
        name: name in the checkpoint.
        dims: its dimensions in storage order.
        when: whether a checkpoint of these sizes has it.
        writes_residual: the last tensor of a block before its output joins the residual stream: a
            projection, or the gain of a norm that follows it. Zero makes the block an identity.
            Where a norm follows, the projection in front of it is not marked: zeroing that would
            be exact too, but its first gradient is amplified by 1 / sqrt(eps).
        gain_offset: a norm's gain is the stored value plus this (Gemma stores w, the gain is
            1 + w).
        closed_at: what is stored where the block is an identity, if that is not a gain of zero.
        passes_on: of the norm that ends a post-norm layer: what it stores once identity layers
            stand behind it, the last of which has its old numbers.
        init: how a part without a source starts: ``normal`` (std ``initializer_range``), ``ones``,
            ``zeros`` or ``thirds`` (1/3).
        own_start: the class starts it in a way that growkit does not know, so that no layer with
            it can be made from scratch.
        values: numbers of the model in a stored element: two where it packs values of four bits,
            none in a scale of quantised weights.
        stack: the axis that counts the layers it belongs to (see :class:`Stack`).
        layers: whether a layer of a model of these sizes has it (layers with and without experts).
        of_experts: weights of the experts, of which a token meets only those it is routed to.
        uses: how often a token meets every weight (a convolution over the channels of a head).
        expert: index of the expert that it belongs to, once ``{expert}`` is filled in.
    """

    role: str
    name: str
    dims: tuple[Dim, ...]
    when: Callable[[Sizes], bool] = always
    writes_residual: bool = False
    init: str = "normal"
    gain_offset: float = 0.0
    stack: str = "layer"
    layers: Callable[[Sizes, int], bool] = every_layer
    of_experts: bool = False
    uses: Callable[[Sizes], int] = once
    expert: int | None = None
    own_start: bool = False
    values: int = 1
    closed_at: float | None = None
    passes_on: float | None = None

    @property
    def closing(self) -> float:
        """What every entry is in an identity layer, if it writes the residual stream."""
        return -self.gain_offset if self.closed_at is None else self.closed_at

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def named(self, sizes: Sizes, layer: int | None = None) -> str:
        """Its name in a checkpoint of these sizes."""
        if layer is not None:
            return self.name.replace("{layer}", str(layer))
        return _BEHIND.sub(lambda found: str(sizes["layer"] + int(found[1])), self.name)

    @property
    def is_gain(self) -> bool:
        """The gain of a norm over the residual stream."""
        scales = self.init == "ones" or self.gain_offset != 0.0
        return scales and any(dim.normed for dim in self.dims)

    def per_expert(self, sizes: Sizes) -> tuple[Tensor, ...]:
        """The tensor of every expert where each stores its own, otherwise the tensor itself."""
        if "{expert}" not in self.name:
            return (self,)
        return tuple(
            replace(self, name=self.name.replace("{expert}", str(expert)), expert=expert)
            for expert in range(sizes["expert"])
        )

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape in a checkpoint of these sizes."""
        return tuple(dim.layout(sizes).width for dim in self.dims)


@dataclass(frozen=True)
class Stack:
    """Layers that follow one another. A decoder is one stack; an encoder-decoder has two.

    Attributes:
        axis: the size that counts its layers, and the word that names it in plans.
        attended: part of the context that a token attends to on average, added over the attention
            blocks of a layer: one half under a causal mask.
        caches: key/value caches a layer.
    """

    axis: str = "layer"
    attended: float = 0.5
    caches: int = 1


@dataclass(frozen=True)
class Link:
    """Which units of ``target`` each unit of ``source`` works with (query head -> kv head).

    ``indices(sizes)`` has shape [units of source, linked units].
    """

    source: str
    target: str
    indices: Callable[[Sizes], IntArray]


@dataclass(frozen=True)
class Norm:
    """The norms over the residual stream, as padding it has to know them.

    Attributes:
        eps_field: config field of their epsilon; None where the class has a constant.
        eps: what the class assumes where the config is silent.
        centred: they subtract the mean (LayerNorm); else RMSNorm.
        shared_with: other norms that read the same field, in words; empty where there are none.
        shared_inputs: roles of the tensors that make what those norms read.
        refusal: why new channels cannot be silent, or empty.
    """

    eps_field: str | None = "rms_norm_eps"
    eps: float = 1e-6
    centred: bool = False
    shared_with: str = ""
    shared_inputs: tuple[str, ...] = ()
    refusal: str = ""


def no_facts(names: Collection[str]) -> dict[str, int]:
    """The config alone says what the family is made of."""
    return {}


def no_objection(config: Config, sizes: Sizes) -> str | None:
    """transformers loads every config that this family writes."""
    return None


@dataclass(frozen=True)
class Family:
    """One family of checkpoints, as data.

    Attributes:
        name: our name for it.
        model_types: values of ``model_type`` in config.json.
        attention: value of its field ``attention_field`` where one model type has several families.
        attention_field: config field that names the attention.
        tensors: every tensor of a checkpoint.
        links: which heads work together.
        sizes: axis sizes (and layout facts) of a config.
        stored_facts: facts that the config does not settle, from the names of the stored tensors.
        config_fields: the config fields that hold the sizes.
        per_layer_fields: config lists with one entry a layer.
        layer_rules: for such a list that config.json may leave out, what the class makes of
            (config, layers) then; listed after the fields that its rule reads.
        layers_at: path of the part of the config that has these lists.
        fresh_entries: for such a list that config.json always states, what layers made from scratch
            have in it: (config, layers) -> one entry a layer.
        windows_everywhere: the class applies ``sliding_window`` to every layer.
        layer_counts: config fields that count leading layers (``max_window_layers``).
        stacks: the stacks of layers, in the order in which a token passes them.
        ties_by_values: the class ties the output projection to the embedding whenever a
            checkpoint stores no other values for it, whatever the config says.
        norm: how the residual stream is normalised.
        head_dim: whether heads can get more channels.
        sqrt_embedding_scale: the class multiplies embeddings by sqrt(hidden_size).
        root_divided: roles of tensors whose output the class divides by sqrt(hidden_size).
        kv_elements: elements per token of one KV cache of a layer.
        attention_flops: FLOPs of scores and values per token, attention block and unit of context.
        sqrt_head_divisor: whether the class divides the last hidden state by sqrt(hidden_size).
        refusal: why transformers would refuse a config with these sizes, or None.
        aliases: further names under which a class knows a tensor -> name that is written.
        ignored: patterns of stored buffers that carry nothing.
        unread: roles of tensors that the class does not read and that are copied as they are; of a
            family without a checkpoint, patterns of their names.
        wider: name of the family that holds the models that ``refusal`` objects to.
        adopt: the config of a checkpoint of another family (config, family, sizes) in the words of
            this one.
        adopted_facts: facts that the checkpoint of another family has in this one, from its config.
        refused: options of operators that cannot be exact here -> why.
        lambda_init: lambda_init of a layer (differential families).
        gainless_head_norm: the class norms the output of every head, without a gain to store.
        lambda_scale_role: role of the tensor that absorbs a change of (1 - lambda_init), for
            formats that compute lambda_init from the layer index; None where it is stored.
        full_copies_only: axes on which only whole copies are exact (a norm runs over the axis).
        prefix: of the names of the model's body; files without it are read too.
        scaled_by_depth: the class scales what a block adds by a root of the number of layers, and a
            config field makes up for it.
        map_layers: what the config (grown so far) says of single layers of a stack once they are
            made of these old ones, where that is more than ``per_layer_fields``.
        layer_period: layers that are inserted together, behind a multiple of as many.
        hidden_along: axes that grow by the factor of the hidden size, which the class ties them to.
        first_copied: stack -> its first layer that may be copied: those before it are of a kind of
            their own.
        origin: where the table comes from, if a person did not write it.
        spellings: another name under which config.json may hold a field of ``config_fields``.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    sizes: Callable[[Config], dict[str, int]]
    config_fields: Callable[[Sizes], dict[str, Any]]
    kv_elements: Callable[[Sizes], int]
    attention_flops: Callable[[Sizes], int]
    links: tuple[Link, ...] = ()
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    layer_rules: Mapping[str, LayerRule] = field(default_factory=dict)
    layers_at: tuple[str, ...] = ()
    fresh_entries: Mapping[str, LayerRule] = field(default_factory=dict)
    windows_everywhere: bool = False
    layer_counts: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = (Stack(),)
    stored_facts: Callable[[Collection[str]], dict[str, int]] = no_facts
    ties_by_values: bool = False
    norm: Norm = Norm()
    head_dim: HeadDimRule = PLAIN_ROTARY
    sqrt_embedding_scale: bool = False
    root_divided: tuple[str, ...] = ()
    sqrt_head_divisor: Callable[[Sizes], bool] = field(default=lambda sizes: False)
    refusal: Callable[[Config, Sizes], str | None] = no_objection
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    unread: tuple[str, ...] = ()
    attention: str | None = None
    attention_field: str = "attention"
    wider: str | None = None
    adopt: Callable[[Config, Family, Sizes], dict[str, Any]] | None = None
    adopted_facts: Callable[[Config], dict[str, int]] = field(default=lambda config: {})
    refused: Mapping[str, str] = field(default_factory=dict)
    lambda_init: Callable[[Config, int], float] | None = None
    gainless_head_norm: bool = False
    lambda_scale_role: str | None = None
    full_copies_only: Callable[[Sizes], tuple[str, ...]] = field(default=lambda sizes: ())
    spellings: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    map_layers: Callable[[Config, Sequence[int], str], dict[str, Any]] | None = None
    layer_period: int = 1
    hidden_along: tuple[str, ...] = ()
    scaled_by_depth: bool = False
    first_copied: Mapping[str, int] = field(default_factory=dict)
    origin: str = ""

    @property
    def differential(self) -> bool:
        """Heads stand in a signal and a noise group."""
        return self.lambda_init is not None

    @property
    def is_encoder(self) -> bool:
        """No layer keeps a cache: no next token is predicted."""
        return not any(stack.caches for stack in self.stacks)

    def names(self, sizes: Sizes) -> Iterator[tuple[Tensor, int | None, str]]:
        """(tensor, layer or None, name) of every tensor of a checkpoint, in writing order."""
        experts = {tensor.role: tensor.per_expert(sizes) for tensor in self.present(sizes)}
        for tensor, layer in self.members(sizes):
            for member in experts[tensor.role]:
                yield member, layer, member.named(sizes, layer)

    def present(self, sizes: Sizes) -> list[Tensor]:
        """The declared tensors that some layer of a checkpoint of these sizes has."""
        return [tensor for tensor in self.tensors if tensor.when(sizes)]

    def members(self, sizes: Sizes) -> Iterator[tuple[Tensor, int | None]]:
        """(tensor, layer or None) in writing order; the experts of a layer count as one."""
        present = self.present(sizes)
        outer = [tensor for tensor in present if not tensor.per_layer]
        yield from ((tensor, None) for tensor in outer if tensor.role == "embed")
        for stack in self.stacks:
            layered = [t for t in present if t.per_layer and t.stack == stack.axis]
            for layer in range(sizes[stack.axis]):
                yield from ((tensor, layer) for tensor in layered if tensor.layers(sizes, layer))
        yield from ((tensor, None) for tensor in outer if tensor.role != "embed")

    def declared(self, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of a checkpoint, in writing order; a shape is computed once
        a role."""
        shape_of: dict[str, tuple[int, ...]] = {}
        for tensor, _, name in self.names(sizes):
            shape = shape_of.get(tensor.role)
            if shape is None:
                shape = shape_of[tensor.role] = tensor.shape(sizes)
            yield name, shape

    def count(self, sizes: Sizes) -> int:
        """How many tensors :meth:`names` gives, without making their names."""
        total = 0
        for tensor in self.tensors:
            if tensor.when(sizes):
                layers = sizes[tensor.stack] if tensor.per_layer else 1
                if tensor.layers is not every_layer:
                    layers = sum(tensor.layers(sizes, layer) for layer in range(layers))
                total += layers * (sizes["expert"] if "{expert}" in tensor.name else 1)
        return total

    def stored_as(self, names: Collection[str]) -> Family:
        """The family with the names that a checkpoint uses: with the prefix, or without."""
        if not self.prefix or not names or any(name.startswith(self.prefix) for name in names):
            return self
        tensors = (replace(t, name=t.name.removeprefix(self.prefix)) for t in self.tensors)
        return replace(self, prefix="", tensors=tuple(tensors))

    def tensor(self, role: str) -> Tensor | None:
        """The tensor with this role, if the family has one."""
        return next((t for t in self.tensors if t.role == role), None)

    def sizes_of(self, config: Config, names: Collection[str] = ()) -> dict[str, int]:
        """Sizes and facts of a checkpoint with this config that stores tensors of these names."""
        return self.sizes(config) | (self.stored_facts(names) if names else {})

    def tied_names(self, sizes: Sizes) -> dict[str, str]:
        """Name that a checkpoint need not store -> tensor whose values it takes.

        The output projection of a tied checkpoint, and what ``aliases`` lists.
        """
        names = dict(self.aliases)
        head, embedding = self.tensor("lm_head"), self.tensor("embed")
        if head is not None and embedding is not None and sizes["tied"]:
            names[head.name] = embedding.name
        return names

    def layer_list(self, config: Config, name: str, layers: int) -> list[Any] | None:
        """The config's list ``name``, one entry a layer, or what the class makes without it.

        None when the class has no such list.

        Raises:
            UsageError: the stored list is too short.
        """
        for part in self.layers_at:
            config = config[part]
        values = config.get(name)
        if isinstance(values, list):
            if len(values) < layers:
                raise UsageError(
                    f"config.json has {len(values)} entries in {name} for {layers} layers.",
                    f"{name} needs one entry a layer; transformers would not load this folder.",
                )
            return values[:layers]
        return self.layer_rules[name](config, layers) if name in self.layer_rules else None

    def attention_windows(self, config: Config, layers: int) -> list[int | None]:
        """How many tokens each layer of the first stack looks back on; None: all of them.

        A window that the config leaves to the class is not known here.
        """
        width = config.get("sliding_window")
        if not isinstance(width, int) or not width:
            return [None] * layers
        kinds = self.layer_list(config, "layer_types", layers)
        if kinds is None:
            return [width if self.windows_everywhere else None] * layers
        return [width if kind == "sliding_attention" else None for kind in kinds]

    def check_tensors(
        self, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, folder: Path | None = None
    ) -> None:
        """Raise CheckpointError unless the stored tensors are exactly the declared ones.

        ``folder``: where they are stored, for the remedy.
        """
        declared = self.count(sizes)
        if declared > 2 * len(shapes) + 1000:  # said before so many names are made
            raise CheckpointError(
                f"config.json declares {declared} tensors, and the checkpoint stores "
                f"{len(shapes)}.",
                "The config and the weights disagree; check the numbers of layers and experts.",
            )
        expected = dict(self.declared(sizes))
        for name, shape in expected.items():
            if name not in shapes:
                raise explain_tensors(expected, shapes, folder) or CheckpointError(
                    f"Tensor {name!r} of family {self.name} is missing from the checkpoint.",
                    "The config and the weights disagree; download the folder again.",
                )
            if tuple(shapes[name]) != shape:
                raise CheckpointError(
                    f"Tensor {name!r} has shape {list(shapes[name])}, but the config says "
                    f"{list(shape)}.",
                    "The config and the weights disagree; check num_attention_heads, head_dim, "
                    "hidden_size and intermediate_size in config.json.",
                )
        tied = self.tied_names(sizes)
        for name in shapes:
            if name in tied and tuple(shapes[name]) == expected[tied[name]]:
                continue  # a second copy of the embedding; growth compares them
            if name not in expected and not any(re.fullmatch(p, name) for p in self.ignored):
                raise CheckpointError(
                    f"Tensor {name!r} is not part of the {self.name} architecture.",
                    f"{nearest(name, expected)}growkit grows only tensors whose axes it knows.",
                )


def layer_count(config: Config, name: str = "num_hidden_layers") -> int:
    """A number of layers: 0 is a model too (embedding, final norm, output projection), which
    progressive training may start from. UsageError for anything that is no such number."""
    return 0 if config.get(name) == 0 else required(config, name)


def required(config: Config, name: str) -> int:
    """A positive integer field of the config, or UsageError."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(
            f"config.json has {name} = {value!r}.", f"Set {name} to a positive whole number."
        )
    return value
