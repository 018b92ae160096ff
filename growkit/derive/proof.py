"""The proof: every operator is carried out on the twin by growkit's own plan and writer.

The twin is written as a folder and grown through the derived table; what was written is loaded in
transformers again and must compute the twin's logits, with a cache as without, and every new tensor
must get a gradient within two steps of training. A control breaks one thing (a reader that reads
its neighbour's units; an inserted layer that is not closed) and must be seen: a proof counts only
where the control bites.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from growkit.derive import head_size
from growkit.derive.builder import Builder, Underivable, plain_kernels, said_by, token_ids
from growkit.derive.stored import Arrays, StoredModel, relative_error
from growkit.families.derived.form import layers_fed
from growkit.families.derived.store import forget, register
from growkit.families.layer_fields import factor_fields, leaf
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest
from growkit.verification.decoding import greedy
from growkit.verification.model_inputs import outputs
from growkit.verification.sight import open_eyes

TOLERANCE = 5e-5
BITES = 1e-3
ROUNDING = 1e-3  # errors up to here may be rounding: they are measured in float64
NEW_TOKENS = 4
HEAD_NORMS = "the norms of query and key heads"
PROJECTOR = "its towers write vectors of the hidden size, and they are copied as they are"


def prove(
    table: dict[str, Any],
    builder: Builder,
    found: Any,
    step: Callable[[str], None],
    *,
    only: Collection[str] = (),
) -> None:
    """Fill ``table["operators"]``: the figures of a proof, or why an operator is not offered.

    ``only``: try these options and say nothing of the others.
    """
    prover = _Prover(table, builder, found)
    with _folder() as folder:
        prover.write_twin(folder / "twin")
        attention = None if only else head_size.find_attention(table, builder, found)
        norm = table["stream"].get("norm", {})
        if attention is not None and attention.normed:
            norm |= {"shared": HEAD_NORMS, "shared_inputs": attention.normed}
        for option, request in _requests(table, found):
            if only and option not in only:
                continue
            step(f"proof of {option}")
            table["operators"][option] = prover.tried(option, request, folder)
            if option == "--untie-embeddings" and table["tied"] is True:
                table["operators"][option] |= _always_tied(table["operators"][option])
            if option == "--hidden":
                _hidden(table, prover, request, folder)
        for option, why in ({} if only else _never(found)).items():
            table["operators"].setdefault(option, {"why": why})
        if attention is not None:
            step("proof of --head-dim")
            table["operators"]["--head-dim"] = _head_dim(table, prover, attention, folder)
        shutil.rmtree(folder / "twin", ignore_errors=True)


def _always_tied(proof: Mapping[str, Any]) -> dict[str, str]:
    """In plain words, that no config unties what the class ties."""
    if "cannot state the grown sizes" not in proof.get("why", ""):
        return {}
    return {"why": "its class ties the output projection to the embedding, whatever it is told"}


def _hidden(table: dict[str, Any], prover: _Prover, request: dict[str, Any], folder: Path) -> None:
    """An embedding that the class scales by a root of the hidden size; padding."""
    stream, operators = table["stream"], table["operators"]
    if "why" in operators["--hidden"]:
        stream["sqrt_embedding"] = True
        for divided in ([], *([role] for role in prover.divided())):
            stream["root_divided"] = divided
            scaled = prover.tried("--hidden", request, folder)
            if "error" in scaled:
                break
        else:
            stream["sqrt_embedding"], stream["root_divided"] = False, []
            return
        operators["--hidden"] = scaled
    if "why" in stream["norm"]:
        return
    padded = dict.fromkeys(request, "x1.5") | {"hidden_method": "pad"}
    result = prover.tried("--hidden", padded, folder)
    if "why" in result:
        stream["norm"] = {"why": "padding could not be proven: " + result["why"]}
    else:
        operators["--hidden"]["padding"] = result


def _head_dim(
    table: dict[str, Any], prover: _Prover, attention: head_size.Attention, folder: Path
) -> dict[str, Any]:
    """Wider heads, as far as the position encoding and norms of heads allow."""
    hidden = table["operators"]["--hidden"]
    if table["fills"] and "why" in hidden:
        return {"why": f"its heads fill the hidden size, which cannot grow ({hidden['why']})"}
    if attention.why:
        return {"why": attention.why}
    entries = {entry["role"]: entry for entry in table["tensors"]}
    for role, *place in attention.keys:
        entries[role].setdefault("keys", []).append(place)
    request = {"head_dim": "x2", "hidden": "x2"}
    if not table["fills"]:
        field = table["axes"]["head_dim"][0].split(".")
        odd = leaf(prover.found.values, (*prover.found.layers.place, *field)) % 2
        request = {"head_dim": "x2" if odd else "x1.5"}
    result: dict[str, Any] = {}
    for trial in head_size.trials(prover.builder, prover.found):
        table["heads"] = trial
        result = prover.tried("--head-dim", request, folder)
        if "error" in result:
            return result
    del table["heads"]
    for entry in entries.values():
        entry.pop("keys", None)
    return {"why": head_size.reason(prover.builder, prover.found, result["why"])}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="growkit-derive-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def why_no_ffn(found: Any) -> str:
    """Why no field of the config widens the FFN, as far as sizes tell."""
    hard: dict[int, set[bool]] = {}  # multiple of another size -> on which sides of matrices
    for role in found.axes.roles:
        sizes = [next(iter(size.items())) for size in role.sizes if size and len(size) == 1]
        if len(sizes) == len(role.sizes) == 2 and sizes[0][0] == sizes[1][0]:
            first, second = sizes[0][1], sizes[1][1]
            if len(sizes[0][0]) == 1 and min(first, second) == 1 < max(first, second):
                hard.setdefault(max(first, second), set()).add(first < second)
    for times, sides in hard.items():
        if len(sides) == 2:
            return (
                f"its class makes the FFN {times} times as wide as the hidden size, whatever the "
                "config says"
            )
    if inner := next((path[-1] for path in found.axes.fields if "expand" in path[-1]), None):
        return (
            f"its blocks have no FFN: they are {inner} times as wide as the hidden size, in heads"
        )
    return "no width of its FFN was found in the config"


def _never(found: Any) -> dict[str, str]:
    """Options that no derived table offers yet, or not this one."""
    return {
        "--layers": "its layers cannot be told apart",
        "--ffn": why_no_ffn(found),
        "--query-heads": "its config cannot change the number of heads at a fixed head size",
        "--heads": "its config cannot change the number of heads at a fixed head size",
        "--kv-heads": "it has no key/value heads of their own number",
        "--hidden": "no field of its config was found that sizes the residual stream",
        "--experts": "no number of experts and of those a token is sent to was found in its config",
        "--vocab": "no field of its config sizes the vocabulary alone",
        "--untie-embeddings": "its class has no output projection of its own to untie or to tie",
        "--decoder-layers": "it has no decoder beside an encoder",
    }


def _requests(table: dict[str, Any], found: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried."""
    if not found.closings.refusal:
        behind = {"layer_placement": "end"} if layers_fed(found.values) else {}
        yield "--layers", {"layers": "x2", **behind}
    else:
        table["operators"]["--layers"] = {"why": _sentence(found.closings.refusal)}
    if found.second is not None:
        if not found.second.refusal:
            yield "--decoder-layers", {"decoder_layers": "x2"}
        else:
            table["operators"]["--decoder-layers"] = {"why": _sentence(found.second.refusal)}
    if any(axis.startswith("ffn") for axis in table["axes"]):
        whole = any(axis.startswith("ffn") for axis in table["whole"])
        yield "--ffn", {"ffn": "x2" if whole else "x1.5"}
    else:
        for key, why in found.failures.items():
            if key.startswith("ffn:"):
                table["operators"]["--ffn"] = {"why": _sentence(why)}
    together = {"hidden": "x2"} if "query_head" in table["fills"] else {}
    if table["carried"] and builder_is_blind(found):
        fixed = ["--hidden", *(("--query-heads", "--heads") if together else ())]
        table["operators"] |= {option: {"why": PROJECTOR} for option in fixed}
    elif unseen := _unseen_tower(table, found):
        table["operators"]["--hidden"] = {
            "why": f"Nothing that growkit can make runs through {unseen}*"
        }
    elif found.stream is not None:
        yield "--hidden", {"hidden": "x2"} | ({"heads": "x2"} if together else {})
    elif why := found.failures.get("hidden"):
        table["operators"]["--hidden"] = {"why": _sentence(why)}
    if table["tied"]:
        yield "--untie-embeddings", {"untie_embeddings": True}
    if "vocab" in table["axes"]:
        yield "--vocab", {"vocab": "x2"}
    if "expert" in table["axes"]:
        yield "--experts", {"experts": "x2"}
    if "query_head" not in table["axes"]:
        why = found.failures.get("query_head")
        if why and not why.startswith("No tensor depends"):
            table["operators"]["--query-heads"] = {"why": _sentence(why)}
        return
    if "kv_head" in table["axes"]:
        if "--query-heads" not in table["operators"]:
            yield "--query-heads", {"query_heads": "x2"} | together
        yield "--kv-heads", {"kv_heads": "x2"}
    if "--heads" not in table["operators"]:
        yield "--heads", {"heads": "x2"} | together


def _unseen_tower(table: Mapping[str, Any], found: Any) -> str:
    """What the names of a tower begin with of which no tensor gets a gradient, whatever the twin
    was given: nobody can say what it writes. Empty where there is none."""
    for prefix in table["carried"]:
        inside = [n for n, role in enumerate(found.axes.roles) if role.name.startswith(prefix)]
        if all(number in found.dead for number in inside):
            return str(prefix)
    return ""


def builder_is_blind(found: Any) -> bool:
    """Nothing was found that the towers of the twin can be given."""
    return found.model.builder.sight is None


def _sentence(text: str) -> str:
    return text.rstrip(".")


class _Prover:
    """Grows one twin."""

    def __init__(self, table: dict[str, Any], builder: Builder, found: Any) -> None:
        self.table, self.builder, self.found = table, builder, found
        found.model.write(found.weights)
        self.logits = [found.model.logits(seed) for seed in (0, 1)]
        self.generated: tuple[torch.Tensor, torch.Tensor] | None = None

    def write_twin(self, folder: Path) -> None:
        """The twin as a folder."""
        write_folder(self.builder, self.found, folder)
        twin = load_folder(self.builder, folder)
        with torch.no_grad():
            again = outputs(twin, token_ids(twin, 0))
        error = relative_error(again.float(), self.logits[0])
        if not error <= TOLERANCE:
            raise Underivable(f"The twin itself computes other logits once saved ({error:.2g}).")
        self.generated = generated(twin, self.tokens(0))

    def tried(self, option: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Figures of the proof, or ``why`` not."""
        out = folder / "grown"
        shutil.rmtree(out, ignore_errors=True)
        trial = dict(self.table, operators={})
        register(trial)
        try:
            grow_checkpoint(
                folder / "twin", out, GrowthRequest.from_mapping(request), verify=False, threads=1
            )
            return self._compared(option, out) | {"request": next(iter(request.values()))}
        except Exception as error:  # whatever the class objects to
            return {"why": said_by(error)}
        finally:
            forget(trial)
            shutil.rmtree(out, ignore_errors=True)

    def _compared(self, option: str, out: Path) -> dict[str, Any]:
        loaded = load_folder(self.builder, out)
        rows = self.logits[0].shape[-1]
        with torch.no_grad():
            pairs = [
                (outputs(loaded, self.tokens(seed))[..., :rows], wanted)
                for seed, wanted in enumerate(self.logits)
            ]
        error = max(relative_error(found.float(), wanted) for found, wanted in pairs)
        precise: dict[str, Any] = {}
        if TOLERANCE < error <= ROUNDING:
            precise = {"float32": float(f"{error:.2g}")}
            error = self._in_double(loaded)
        if not error <= TOLERANCE:
            raise Underivable(f"The grown twin computes other logits (relative error {error:.2g}).")
        self._check_generation(loaded)
        del loaded
        read = self.builder.config_class.from_pretrained(out)
        values = json.loads(json.dumps(read.to_dict(), default=str))
        grown = StoredModel(self.builder, values)
        weights = dict(load_file(out / "model.safetensors"))
        self._alive(grown, weights)
        control = self._control(option, grown, weights)
        if control < BITES:
            raise Underivable(f"Its control does not bite (relative error {control:.2g}).")
        result = {"error": float(f"{error:.2g}"), "control": float(f"{control:.2g}"), **precise}
        return result if self.generated else result | {"generation": "not cached"}

    def _in_double(self, loaded: Any) -> float:
        """Relative error of the logits in float64: what a deep twin makes of float32's rounding is
        no error of growth."""
        twin = copy.deepcopy(self.found.model.model).double()
        errors = []
        with torch.no_grad():
            for seed in range(len(self.logits)):
                tokens = self.tokens(seed)
                wanted, found = outputs(twin, tokens), outputs(loaded.double(), tokens)
                errors.append(relative_error(found[..., : wanted.shape[-1]], wanted))
        loaded.float()
        return max(errors)

    def divided(self) -> list[str]:
        """Roles outside the layers that read the stream: a class may divide by its root there."""
        names = {self.found.axes.roles[place].name for place, _ in self.found.stream.readers}
        return [
            entry["role"]
            for entry in self.table["tensors"]
            if entry["name"] in names
            and "{layer}" not in entry["name"]
            and entry["role"] != "lm_head"
        ][:3]

    def tokens(self, seed: int) -> torch.Tensor:
        """The twin's token ids, whatever rows the grown vocabulary has."""
        return token_ids(self.found.model.model, seed)

    def _check_generation(self, loaded: Any) -> None:
        """Raise unless generation with a cache gives what it gives from the twin."""
        if self.generated is None:
            return
        found = generated(loaded, self.tokens(0))
        if found is None:
            raise Underivable("The grown twin cannot generate with a cache, as the twin can.")
        same = torch.equal(found[0], self.generated[0])
        rows = self.generated[1].shape[-1]
        error = relative_error(found[1][..., :rows], self.generated[1]) if same else float("inf")
        if not error <= 20 * TOLERANCE:
            raise Underivable(f"Generation with a cache differs from the twin's ({error:.2g}).")

    def _reached(self, model: StoredModel, weights: Arrays) -> set[tuple[int | None, str]]:
        """(layer, role) that get a gradient within two steps of descent."""
        moved = dict(weights)
        reached: set[tuple[int | None, str]] = set()
        for seed in (0, 1):
            model.write(moved)
            for name, gradient in model.gradients(seed).items():
                size = float(np.abs(gradient).max(initial=0.0))
                if size and np.isfinite(size):
                    reached.add(self.found.axes.names.role_name(name)[:2])
                    moved[name] = moved[name] - 1e-2 * gradient / size
        return reached

    def _alive(self, grown: StoredModel, weights: Arrays) -> None:
        """Raise unless two steps of descent reach every tensor that they reach in the twin."""
        names, roles = self.found.axes.names, self.found.axes.roles
        reached = self._reached(grown, weights)
        dead = {roles[number].name for number in self.found.dead}
        lacking = [
            name
            for name in weights
            if (key := names.role_name(name)[:2]) not in reached
            and key[1] not in dead
            and name not in grown.opaque
        ]
        if not lacking:
            return
        # What has none in a layer of the twin has none in what was made of that layer.
        here = self._reached(self.found.model, self.found.weights)
        self.found.model.write(self.found.weights)
        silent = {key[1] for n in self.found.weights if (key := names.role_name(n)[:2]) not in here}
        if wrong := [name for name in lacking if names.role_name(name)[1] not in silent]:
            raise Underivable(f"No gradient reaches {wrong[0]!r} in two steps.")

    def _control(self, option: str, grown: StoredModel, weights: Arrays) -> float:
        """Relative error of the logits when one thing is broken; of several, the smallest."""
        errors = [self._error_of(grown, self._broken_weights(option, weights))]
        if option == "--hidden" and (written := list(self._projections())):
            errors.append(self._error_of(grown, self._moved(weights, written)))
        return min(errors)

    def _broken_weights(self, option: str, weights: Arrays) -> Arrays:
        broken = dict(weights)
        names, roles = self.found.axes.names, self.found.axes.roles
        if option in ("--layers", "--decoder-layers"):
            generator = np.random.default_rng(0)
            closed = {roles[number].name for number in self.found.closings.values}
            for name, array in weights.items():
                layer, template, _ = names.role_name(name)
                flat = np.unique(array).size == 1
                if layer is not None and template in closed and flat:
                    broken[name] = generator.normal(0, 0.2, array.shape).astype(array.dtype)
        else:
            broken = self._moved(weights, self._broken(option))
        return broken

    def _moved(self, weights: Arrays, places: Iterable[tuple[int, int, int]]) -> Arrays:
        """Weights whose entries stand elsewhere: (role, dimension, by how many elements)."""
        names, roles = self.found.axes.names, self.found.axes.roles
        moved = dict(weights)
        for number, dim, block in places:
            for name, array in weights.items():
                if names.role_name(name)[1] == roles[number].name:
                    moved[name] = np.roll(array, block, axis=dim)
        return moved

    def _projections(self) -> Iterator[tuple[int, int, int]]:
        """What a wrapper's towers write into the residual stream."""
        stream, roles = self.found.stream, self.found.axes.roles
        for number, dim in stream.inside:
            other = roles[number].name.startswith(tuple(self.table["carried"]) or ("\0",))
            if other and (number, dim) not in stream.readers:
                yield number, dim, 1

    def _error_of(self, grown: StoredModel, broken: Arrays) -> float:
        grown.write(broken)
        rows = self.logits[0].shape[-1]
        return max(
            relative_error(grown.logits(seed, self.tokens(seed))[..., :rows], wanted)
            for seed, wanted in enumerate(self.logits)
        )

    def _broken(self, option: str) -> Iterator[tuple[int, int, int]]:
        """(role, dimension, elements) by which a control moves what should stay in its place."""
        found, roles = self.found, self.found.axes.roles
        if option == "--hidden":
            yield from ((number, dim, 1) for number, dim in found.stream.readers)
        elif option == "--head-dim":
            yield from ((number, dim, 1) for number, dim in found.widths["query_head"].readers)
        elif option in ("--vocab", "--untie-embeddings", "--experts"):
            axis = "expert" if option == "--experts" else "vocab"
            moved = self.table["axes"][axis]
            for number, role in enumerate(roles):
                entry = next((t for t in self.table["tensors"] if t["name"] == role.name), None)
                for dim, (_, segments) in enumerate(entry["dims"] if entry else ()):
                    if segments[0][0] == axis and moved and len(role.shape) == 2:
                        yield number, dim, 1
        else:
            axis = "ffn" if option == "--ffn" else "query_head"
            units = found.axes.fields[found.paths[axis][0]]
            for number, dim in found.widths[axis].readers:
                yield number, dim, max(1, roles[number].shape[dim] // units)


def write_folder(builder: Builder, found: Any, folder: Path) -> None:
    """A twin's config and weights as a checkpoint folder."""
    folder.mkdir()
    config = builder.config(found.values)
    model = found.model.model
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    config.save_pretrained(folder)
    tensors = {name: np.array(array, order="C") for name, array in found.weights.items()}
    tensors |= dict(found.model.opaque.items())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # What the config object adds is said by the twin's own values; what it drops is put back.
    written = json.loads((folder / "config.json").read_text())
    inner = leaf(written, found.layers.place)
    for name, value in leaf(found.values, found.layers.place).items():
        kept = isinstance(value, int | float | str | list) and not factor_fields(name)
        if name not in inner and kept and name[0] != "_":
            inner.setdefault(name, value)
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def load_folder(builder: Builder, folder: Path) -> Any:
    """A written folder in float32, nothing missing.

    Raises:
        Underivable: it does not load whole.
    """
    model, info = builder.auto.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        local_files_only=True,
    )
    plain_kernels(model)
    if builder.sight is not None:
        open_eyes(model, builder.sight)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, info[kind])):
            raise Underivable(f"The grown twin loads with {kind.replace('_', ' ')}: {wrong[0]}.")
    return model.eval()


def generated(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Tokens and logits of greedy generation with a cache; None where the class cannot."""
    try:
        sequences, logits = greedy(model, tokens[:1, :6], NEW_TOKENS)
    except Exception:  # whatever a class objects to
        return None
    return sequences, logits.float()
