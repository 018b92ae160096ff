"""The suite as a whole: from Python, from the command line, and what it says it cannot measure."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import KnownModel
from tiny_checkpoints import COMMON, llama_config, make_folder
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from growkit.cli.main import main
from growkit.converting import convert_checkpoint
from growkit.core.errors import UsageError
from growkit.evaluation import attention_suite
from growkit.evaluation.model import LoadedModel, load
from growkit.evaluation.suite import SuiteOptions
from growkit.variants.request import ConversionRequest

QUICK = SuiteOptions(lengths=(160,), depths=(0.0, 1.0), needles=2, samples=1, prompts=1, windows=2)


def strict(text: str) -> Any:
    """JSON without NaN and infinity, which the standard does not know."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the JSON")

    return json.loads(text, parse_constant=refuse)


def test_from_python_everything_is_measured_and_nothing_changed(folder: Path) -> None:
    loaded = load(folder)
    state = torch.get_rng_state()
    found = attention_suite(loaded, options=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert attention_suite(loaded, options=QUICK) == found, "a pure function of its arguments"
    assert found.notes == ()
    assert {(r.form, r.depth) for r in found.retrieval} == {
        (form, depth) for form in ("city", "copy") for depth in (0.0, 1.0, None)
    }
    assert {(n.form, n.depth) for n in found.context_noise} == {
        (r.form, r.depth) for r in found.retrieval
    }
    assert set(found.context_noise[0].maps) == {"effective", "signal", "noise"}
    assert found.entropy is not None and len(found.entropy.layers) == COMMON["num_hidden_layers"]
    assert found.outliers is not None and found.outliers.attention_logits is not None
    figures = found.figures()
    assert figures["retrieval_ranked.copy.160"] == found.retrieval[-1].ranked.accuracy
    assert figures["entropy_normalised.noise"] == found.entropy.mean["noise"].normalised
    assert all(isinstance(value, float) for value in figures.values())
    strict(json.dumps(found.as_dict()))


def test_a_checkpoint_of_the_same_function_has_the_same_figures(folder, tmp_path: Path) -> None:
    """Llama as GDA with lambda 0: its effective maps, answers and hidden states are Llama's."""
    llama = make_folder(tmp_path / "llama", llama_config())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, llama)
    convert_checkpoint(llama, tmp_path / "gda", ConversionRequest(to="gda"), verify=False)
    before, after = (
        attention_suite(load(path, dtype="float64"), options=QUICK)
        for path in (llama, tmp_path / "gda")
    )
    assert after.retrieval == before.retrieval
    assert "signal" in after.context_noise[0].maps and "signal" not in before.context_noise[0].maps
    for kind in ("attention_answer.copy", "attention_noise.city", "entropy_normalised.effective"):
        assert after.figures()[kind] == pytest.approx(before.figures()[kind], rel=1e-5)
    assert after.outliers.hidden_kurtosis == pytest.approx(before.outliers.hidden_kurtosis)
    # the new noise heads have logits too, which is all that the two models differ in
    assert after.outliers.attention_logits.values > before.outliers.attention_logits.values


def test_in_bfloat16(folder: Path) -> None:
    found = attention_suite(load(folder, dtype="bfloat16"), options=QUICK)
    assert found.notes == ()
    for result in found.context_noise:
        assert sum(astuple(result.maps["effective"].shares)) == pytest.approx(1)


def test_another_seed_asks_for_other_needles(words, text) -> None:
    loaded = KnownModel.loaded(words, "random")
    options = replace(QUICK, samples=10)
    first = attention_suite(loaded, text=text, options=options)
    other = attention_suite(loaded, text=text, options=replace(options, seed=1))
    assert first.retrieval != other.retrieval


def test_the_command(folder: Path, capsys) -> None:
    command = ["eval", str(folder), "--suite", "attention", "--samples", "1", "--needles", "2"]
    assert main([*command, "--lengths", "160", "--json"]) == 0
    report = strict(capsys.readouterr().out)
    assert report["texts"] == {} and set(report["suites"]) == {"attention"}
    suite = report["suites"]["attention"]
    assert set(suite) == {
        *("settings", "context_noise", "retrieval", "entropy", "outliers", "notes")
    }
    assert suite["settings"]["lengths"] == [160] and suite["settings"]["needles"] == 2
    assert main([*command, "--lengths", "160", "--forms", "copy"]) == 0
    shown = capsys.readouterr().out
    for title in ("retrieval: 2 of 2 needles", "attention of the position", "entropy", "outliers"):
        assert title in shown
    assert "city" not in shown


def test_texts_are_scored_beside_the_suite(folder: Path, tmp_path: Path, text, capsys) -> None:
    """Two files of one name are two texts."""
    files = []
    for name, part in (("a", text[:3000]), ("b", text[3000:6000])):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "text.txt")
        files[-1].write_text(part)
    options = [f"--text={file}" for file in files]
    suite = ["--suite", "attention", "--samples", "1", "--lengths", "100", "--forms", "copy"]
    assert main(["eval", str(folder), *options, *suite, "--needles", "2", "--json"]) == 0
    report = strict(capsys.readouterr().out)
    assert set(report["texts"]) == {str(file) for file in files}
    scores = [score["bits_per_byte"] for score in report["texts"].values()]
    assert scores[0] != scores[1]
    assert report["suites"]["attention"]["retrieval"]


def test_what_cannot_be_measured_is_said(words, text, folder: Path) -> None:
    options = replace(QUICK, lengths=(40, 100_000))
    found = attention_suite(load(folder), options=replace(options, forms=("copy",)))
    assert found.settings.lengths == (40, 512)
    assert "cut to max_position_embeddings = 512" in found.notes[0]
    found = attention_suite(load(folder), options=replace(options, forms=("city",)))
    assert {result.length for result in found.retrieval} == {512}
    assert "city needles in 40 tokens not measured" in found.notes[1]

    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1}
    mamba = MambaForCausalLM(MambaConfig(**sizes)).eval()
    loaded = LoadedModel(Path("mamba"), mamba, words, torch.device("cpu"), "float32")
    found = attention_suite(loaded, text=text, options=replace(QUICK, forms=("copy",)))
    assert found.entropy is None and found.context_noise == ()
    assert found.retrieval and found.outliers is not None
    assert found.outliers.attention_logits is None
    assert sum("returns no attention maps" in note for note in found.notes) == 2


def test_an_encoder_decoder_is_refused(words) -> None:
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    loaded = LoadedModel(Path("t5"), model, words, torch.device("cpu"), "float32")
    with pytest.raises(UsageError, match="encoder-decoder"):
        attention_suite(loaded)


def test_a_text_too_short_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    command = ["eval", str(folder), "--suite", "attention", f"--text={tmp_path / 'short.txt'}"]
    assert main(command) == 2
    assert "prompts have 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "attentoin"], "Did you mean 'attention'"),
        (["--forms", "town"], "'town'"),
        (["--lengths", "12,x"], "--lengths '12,x'"),
        (["--lengths", "8"], "at least 16"),
        (["--needles", "1"], "at least 2 needles"),
        (["--needles", "99"], "more than there are cities"),
        (["--queries", "7"], "7 queries of 4 needles"),
        (["--samples", "0"], "samples = 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    tmp_path: Path, arguments: list[str], message: str, capsys
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path), "--suite", "attention", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
