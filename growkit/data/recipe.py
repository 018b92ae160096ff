"""The ``data`` section of a training recipe: what is read, in which shares, and how it is packed.

Exactly one of ``files``, ``dataset``, ``tokens`` and ``mixture`` says where the text comes from; a
mixture has several sources of the first three kinds, each with a name and a weight.
"""

from __future__ import annotations

from fractions import Fraction as Exact
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from growkit.recipe.section import Fraction, Positive, Section

Share = Annotated[float, Field(ge=0)]
TokenType = Literal["uint16", "uint32"]


class DatasetSection(Section):
    """A dataset of the Hub, or a local folder, read through Hugging Face ``datasets``.

    Attributes:
        path: Hub id, folder, or what ``save_to_disk`` wrote.
        name: configuration of the dataset, where it has several.
        split: which split is read.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read it without downloading it as a whole.
        max_tokens: how much of it is tokenized into the cache, in the order of the dataset. A
            stream has no end that is known beforehand, so there it has to be said.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    max_tokens: Positive | None = None

    @model_validator(mode="after")
    def _bounded_stream(self) -> DatasetSection:
        if self.streaming and self.max_tokens is None:
            raise ValueError("'streaming: true' needs 'max_tokens': how much of the stream to take")
        return self


class WeightSection(Section):
    """A weight that changes linearly from the first to the last step; a number stays as it is.

    Attributes:
        from: at the first step.
        to: at the last step.
    """

    from_: Annotated[Share, Field(alias="from")]
    to: Share

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"from": value, "to": value} if isinstance(value, int | float) else value


class SourceSection(Section):
    """One source of a mixture.

    Attributes:
        name: of the source, in metrics and records.
        weight: share of the samples, normalized over all sources.
        files: text files, folders and patterns, also on object storage (``s3://bucket/web/``), or
            ``sample`` (the text that comes with growkit).
        dataset: in place of ``files``.
        tokens: in place of ``files``: token files of other tools.
        text_field: the field of jsonl lines and parquet rows; absent: that of the data section.
        messages_field: in place of it, the field of conversations; absent: that of the data
            section, unless there is a ``text_field`` here.
        token_dtype: of ids in token files that do not say; absent: that of the data section.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    weight: WeightSection
    files: Literal["sample"] | list[Path] | None = None
    dataset: DatasetSection | None = None
    tokens: list[Path] | None = None
    text_field: str | None = None
    messages_field: str | None = None
    token_dtype: TokenType | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSection:
        if (self.files, self.dataset, self.tokens).count(None) != 2:
            raise ValueError("give exactly one of 'files', 'dataset' and 'tokens'")
        _check_not_empty(self.files, self.tokens)
        if self.messages_field and self.text_field:
            raise ValueError("give at most one of 'text_field' and 'messages_field'")
        _check_conversations(self.messages_field, self.files, self.tokens)
        return self

    @property
    def weights(self) -> tuple[Exact, Exact]:
        """At the first and at the last step, exactly as the decimals in the recipe say."""
        return Exact(str(self.weight.from_)), Exact(str(self.weight.to))


def _check_not_empty(files: object, tokens: object) -> None:
    if files == []:
        raise ValueError("'files' is empty: name at least one file, or write 'files: sample'")
    if tokens == []:
        raise ValueError("'tokens' is empty: name at least one token file")


def _check_conversations(field: str | None, files: object, tokens: object) -> None:
    if field is not None and (tokens is not None or files == "sample"):
        what = "'tokens' hold" if tokens is not None else "'files: sample' holds"
        raise ValueError(f"'messages_field' is of conversations, and {what} none")


class DataSection(Section):
    """Text: local files (.txt, .jsonl, .parquet, folders, patterns), datasets, token files, or a
    mixture.

    Attributes:
        files: files, folders and patterns, also on object storage (``s3://bucket/web/``), or
            ``sample`` (the text that comes with growkit).
        dataset: in place of ``files``: Hugging Face datasets.
        tokens: in place of ``files``: token files of other tools (Megatron-LM ``.bin`` with
            ``.idx``, nanoGPT and llm.c ``.bin``, datatrove ``.ds``, litdata and MDS folders).
        mixture: in place of these: several sources with weights.
        text_field: the field of jsonl lines and parquet rows that holds the text.
        messages_field: in place of it, the field that holds conversations, ``messages`` say: they
            are rendered by the chat template, and the loss is on the assistant's tokens alone.
        chat_template: Jinja file to use in place of the tokenizer's template; it is written beside
            the trained model's tokenizer.
        token_dtype: type of the ids in token files that do not say (nanoGPT); absent: ``uint16``
            for a tokenizer of up to 65 536 tokens, else ``uint32``.
        sequence_length: tokens of one training sequence.
        document_attention: ``separate`` keeps attention and loss inside a document; with ``joined``
            a sequence is read as one text.
        eval_fraction: part of the documents that is held out, by a hash of their text.
        eval_files: held-out text of its own; nothing is then held out of the training text.
        eval_tokens: in place of ``eval_files``: held-out token files.
        max_eval_tokens: at most so many held-out tokens are evaluated; absent: all.
        cache_dir: where tokens are kept; absent: in the folder of the run.
        start: ``beginning`` reads from the first sample; absent: where the run that made
            ``model.checkpoint`` stood, if it read the same text.
        workers: tokenizing processes, absent: one per core. The tokens do not depend on it.
    """

    files: Literal["sample"] | list[Path] | None = None
    dataset: DatasetSection | None = None
    tokens: list[Path] | None = None
    mixture: list[SourceSection] | None = None
    text_field: str = "text"
    messages_field: str | None = None
    chat_template: Path | None = None
    token_dtype: TokenType | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 512
    document_attention: Literal["joined", "separate"] = "joined"
    eval_fraction: Fraction = 0.05
    eval_files: list[Path] = Field(default_factory=list)
    eval_tokens: list[Path] | None = None
    max_eval_tokens: Positive | None = None
    cache_dir: Path | None = None
    start: Literal["beginning"] | None = None
    workers: Positive | None = None

    @model_validator(mode="after")
    def _something_to_read(self) -> DataSection:
        _check_not_empty(self.files, self.tokens)
        if (self.files, self.dataset, self.tokens, self.mixture).count(None) != 3:
            raise ValueError("give exactly one of 'files', 'dataset', 'tokens' and 'mixture'")
        if self.eval_files and self.eval_tokens:
            raise ValueError("give at most one of 'eval_files' and 'eval_tokens'")
        if self.mixture is not None:
            self._check_mixture(self.mixture)
        _check_conversations(self.messages_field, self.files, self.tokens)
        if self.chat_template is not None and not self.holds_conversations:
            raise ValueError("'chat_template' has no effect without 'messages_field'")
        return self

    @staticmethod
    def _check_mixture(mixture: list[SourceSection]) -> None:
        if not mixture:
            raise ValueError("'mixture' is empty: name at least one source")
        names = [source.name for source in mixture]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the name {twice!r} stands twice in 'mixture'")
        for end, what in ((0, "first"), (1, "last")):
            if sum(source.weights[end] for source in mixture) == 0:
                raise ValueError(f"all weights of 'mixture' are 0 at the {what} step")

    @property
    def sources(self) -> list[SourceSection]:
        """The sources; a single one has the name ``data`` and the weight 1."""
        if self.mixture is not None:
            return self.mixture
        weight = WeightSection.model_validate(1)
        return [
            SourceSection(
                name="data",
                weight=weight,
                files=self.files,
                dataset=self.dataset,
                tokens=self.tokens,
            )
        ]

    def messages_field_of(self, source: SourceSection) -> str | None:
        """The field of a source's conversations; None: it is text or tokens."""
        if source.tokens is not None or source.files == "sample":
            return None
        return source.messages_field or (None if source.text_field else self.messages_field)

    @property
    def holds_conversations(self) -> bool:
        """Whether some of it is conversations, which need a chat template."""
        return any(self.messages_field_of(source) for source in self.sources)

    @property
    def holds_tokens(self) -> bool:
        """Whether some of it is token ids, of which there is no text."""
        return bool(self.eval_tokens) or any(source.tokens for source in self.sources)

    @property
    def holds_out_files(self) -> bool:
        """Whether there are held-out files of their own."""
        return bool(self.eval_files or self.eval_tokens)
