"""Load a written folder through transformers alone, and let nothing be missing in silence."""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from growkit.core.errors import CheckpointError, GrowkitError, VerificationFailed
from growkit.core.worker import importing
from growkit.families import family_of
from growkit.variants.catalogue import config_reader
from growkit.verification.written_folder import Folder
from growkit.vocabulary.tokenizer_files import tokenizer_contents


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' logs and bars (its load report is only a log line), then restore."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def register_own_models() -> None:
    """Make model type ``gda`` known to the Auto classes when our model is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("growkit.modeling")


def read_config(folder: Folder, *, trust_remote_code: bool = False) -> Any:
    """The folder's config as transformers sees it.

    A folder that transformers has no class for, and one of our models has the layout and the tensor
    names of (Motif: our GDA), is read as that model; with ``trust_remote_code`` the folder's own
    class is taken if it has one.
    """
    from transformers import AutoConfig

    own_code = trust_remote_code and "auto_map" in folder.config
    reader = config_reader(folder.config.get("model_type"))
    if reader is not None and not own_code:
        return reader(folder.config)
    return AutoConfig.from_pretrained(
        folder.path, local_files_only=True, trust_remote_code=trust_remote_code
    )


def check_complete(
    folder: Folder, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> None:
    """Raises:
    VerificationFailed: naming the tensors that are missing, not expected or of another shape.
    """
    unexpected = set(unexpected)
    if unexpected:
        stems = _unread(folder)
        unexpected = {name for name in unexpected if not any(stem in name for stem in stems)}
    problems = {
        "lacks {}, which the model needs": sorted(missing),
        "stores {}, which the model does not know": sorted(unexpected),
        "stores {} in another shape than its config says": sorted(mismatched),
    }
    for sentence, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise VerificationFailed(
                f"{folder.name} {sentence.format(shown)}.",
                "Its config.json and its safetensors files do not belong together: grow it again.",
            )


def _unread(folder: Folder) -> set[str]:
    """Stored tensors that growth knows to be read by no class (multi-token prediction): parts of
    their names that stay as they are when transformers renames and joins tensors on loading."""
    stored = {name: Stored(shape) for name, (_, _, shape) in folder.tensors.items()}
    try:
        unread = family_of(folder.config, stored).unread
    except GrowkitError:  # of no family that growth knows
        return set()
    return {found[0] if (found := _STEM.search(name)) else name for name in unread}


# A layer and its number, or the word for such layers.
_STEM = re.compile(r"[a-z_]+\.\d+\.|(?<![a-z_])mtp\.")


class Stored(NamedTuple):
    """A header entry, as families read it."""

    shape: tuple[int, ...]


def load_model(folder: Folder, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The folder's model in ``dtype`` on the CPU, in evaluation mode: of the class that its config
    names.

    Raises:
        CheckpointError: transformers cannot read the folder.
        VerificationFailed: tensors are missing, unexpected or of the wrong shape.
    """
    with importing():
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        register_own_models()
    with quiet_transformers():
        try:
            config = read_config(folder, trust_remote_code=trust_remote_code)
            auto = None if trust_remote_code else class_of(config)
            if auto is None:
                seq2seq = getattr(config, "is_encoder_decoder", False)
                auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
            model, info = auto.from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:  # whatever transformers objects to, the folder does not load
            raise load_error(folder, error) from error
    check_complete(
        folder,
        info["missing_keys"],
        info["unexpected_keys"],
        (entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]),
    )
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    result: nn.Module = model.eval().requires_grad_(False)
    return result


AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModel",
)


class NamedClass:
    """A model class of transformers, in the way of an Auto class.

    Attributes:
        cls: the class.
    """

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def from_config(self, config: Any, **given: Any) -> Any:
        return self.cls._from_config(config, **given)

    def from_pretrained(self, *args: Any, **given: Any) -> Any:
        given.pop("trust_remote_code", None)
        return self.cls.from_pretrained(*args, **given)


def class_of(config: Any) -> Any:
    """What loads a checkpoint with this config: the class that ``architectures`` names where it is
    another than the first Auto class that knows the config would take; else that one; else None."""
    import transformers

    autos = [getattr(transformers, name, None) for name in AUTO_CLASSES]
    known = [a for a in autos if a is not None and type(config) in a._model_mapping]
    if getattr(config, "is_encoder_decoder", False) and len(known) > 1:
        known = [a for a in known if a is not transformers.AutoModelForCausalLM]  # a decoder alone
    auto = known[0] if known else None
    named = getattr(transformers, str((config.architectures or [""])[0]), None)
    if named is None or getattr(named, "config_class", None) is not type(config):
        return auto
    first = auto and auto._model_mapping[type(config)]
    chosen = first if isinstance(first, tuple) else (first,)
    return auto if named in chosen else NamedClass(named)


def load_error(folder: Folder, error: Exception) -> CheckpointError:
    """One sentence out of whatever transformers raised."""
    cause = reason(error)
    remedy = "Repair the folder, or grow it again."
    if "trust_remote_code" in str(error):
        cause = "the folder brings its own model code, which is not run unless you allow it"
        remedy = "Read the code, then pass --trust-remote-code."
    return CheckpointError(f"transformers cannot load {str(folder.path)!r}: {cause}.", remedy)


def reason(error: Exception) -> str:
    """What an exception of transformers says, on one line: its first line, and the next one where
    the first only announces it (validation errors of strict configs)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    announced = lines[0].endswith(":") and len(lines) > 1
    return " ".join(lines[: 2 if announced else 1]).rstrip(".:")


def load_tokenizer(folder: Folder, *, trust_remote_code: bool = False) -> Any | None:
    """The folder's tokenizer, or None when it has none that loads."""
    if not folder.has_tokenizer:
        return None
    from transformers import AutoTokenizer

    register_own_models()
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception:  # a damaged tokenizer must not stop the comparison: bytes are used
            return None


def load_tokenizers(a: Folder, b: Folder, *, trust_remote_code: bool = False) -> list[Any | None]:
    """The tokenizers of two folders; one object where their files are the same."""
    first = load_tokenizer(a, trust_remote_code=trust_remote_code)
    types = [folder.config.get("model_type") for folder in (a, b)]
    if not trust_remote_code and types[0] == types[1]:
        with contextlib.suppress(GrowkitError):  # one that is too large, or no regular file
            if tokenizer_contents(a.path) == tokenizer_contents(b.path):
                return [first, first]
    return [first, load_tokenizer(b, trust_remote_code=trust_remote_code)]
