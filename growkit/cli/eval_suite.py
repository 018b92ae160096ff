"""``growkit eval --suite attention``: its options, its run and its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from growkit.cli.output import Output
from growkit.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from growkit.evaluation.context_noise import MapShares, Shares
    from growkit.evaluation.model import LoadedModel
    from growkit.evaluation.retrieval import Accuracy
    from growkit.evaluation.suite import AttentionSuite, SuiteOptions

SUITES = ("attention",)
Item = TypeVar("Item")


def suite_options(suite: str, forms: str, lengths: str, **numbers: Any) -> SuiteOptions:
    """The options of a suite, checked before anything is loaded.

    Raises:
        UsageError: naming the option and what is valid.
    """
    from growkit.evaluation.suite import SuiteOptions

    if suite not in SUITES:
        raise UsageError(
            f"--suite {suite!r} is not known.",
            f"{nearest(suite, SUITES)}Valid values: {', '.join(SUITES)}.",
        )
    return SuiteOptions(
        forms=_listed("--forms", forms, str), lengths=_listed("--lengths", lengths, int), **numbers
    )


def run_suite(
    loaded: LoadedModel, text: str | None, options: SuiteOptions, output: Output
) -> AttentionSuite:
    """Measure, and show tables and notes."""
    from growkit.evaluation import attention_suite
    from growkit.verification.loading import quiet_transformers

    bars = output.progress("attention suite", options.passes, unit="passes")
    with quiet_transformers(), bars as bar:
        result = attention_suite(loaded, text=text, options=options, progress=bar)
    for table in (_retrieval_table(result), _noise_table(result), _layer_table(result)):
        if table.row_count:
            output.show(table)
    if result.outliers is not None:
        output.show(_outlier_table(result))
    for note in result.notes:
        output.warn(note)
    return result


def _listed(option: str, text: str, kind: Callable[[str], Item]) -> tuple[Item, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no list of numbers.", "Give 128,256.") from error


def _table(title: str, words: int, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        justify: Any = "left" if place < words else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _depth(depth: float | None) -> str:
    return "all" if depth is None else f"{depth:.0%}"


def _accuracy(found: Accuracy) -> str:
    return f"{found.accuracy:.0%} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def _size(value: float | None) -> str:
    """A size of any magnitude in few letters."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _retrieval_table(suite: AttentionSuite) -> Any:
    used = suite.settings
    table = _table(
        f"retrieval: {used.queries} of {used.needles} needles asked for, accuracy (95% interval)",
        1,
        *("form", "tokens", "depth", "ranked first", "chance", "exact", "chance"),
    )
    for found in suite.retrieval:
        table.add_row(
            found.form,
            str(found.length),
            _depth(found.depth),
            _accuracy(found.ranked),
            f"{found.ranked.chance:.0%}",
            _accuracy(found.exact),
            f"{found.exact.chance:.0e}",
            end_section=found.depth is None,
        )
    return table


def _noise_table(suite: AttentionSuite) -> Any:
    """Every depth of the effective maps; signal and noise heads apart over all depths."""
    table = _table(
        "attention of the position that answers, % (mean over layers and heads)",
        2,
        *("form", "map", "depth", "answer", "best\nhead", "needle", "noise", "first\ntoken"),
        "question",
    )
    for found in suite.context_noise:
        rows: list[tuple[str, Shares, MapShares | None]]
        rows = [(name, maps.shares, maps) for name, maps in found.maps.items()]
        if found.depth is not None:
            rows = rows[:1]
        else:
            rows.append(("even map", found.uniform, None))
        for name, shares, maps in rows:
            best = "" if maps is None else f"{100 * max(maps.answer_of_best_head):.1f}"
            parts = (shares.needle, shares.noise, shares.first_token, shares.question)
            table.add_row(
                found.form,
                name,
                _depth(found.depth),
                f"{100 * shares.answer:.1f}",
                best,
                *(f"{100 * part:.1f}" for part in parts),
                end_section=maps is None,
            )
    return table


def _layer_table(suite: AttentionSuite) -> Any:
    """One row a layer: entropy of each kind of map, hidden states."""
    entropy, outliers = suite.entropy, suite.outliers
    kinds = list(entropy.mean) if entropy is not None else []
    headings = ["layer", *(f"entropy,\n{kind}" for kind in kinds)]
    if outliers is not None:
        headings += ["largest\noutput", "kurtosis\nof outputs"]
    table = _table("layers: attention entropy in nats (over its maximum), outputs", 0, *headings)
    layers = entropy.layers if entropy is not None else ()
    count = max(len(layers), len(outliers.hidden_kurtosis) if outliers is not None else 0)
    for layer in range(count):
        row = [str(layer)]
        for kind in kinds:
            found = layers[layer].get(kind) if layer < len(layers) else None
            row.append("" if found is None else f"{found.nats:.3f} ({found.normalised:.2f})")
        if outliers is not None:
            kurtosis = outliers.hidden_kurtosis[layer]
            row += [_size(outliers.largest_hidden_state[layer]), _size(kurtosis)]
        table.add_row(*row)
    if entropy is not None:
        table.add_section()
        means = [f"{mean.nats:.3f} ({mean.normalised:.2f})" for mean in entropy.mean.values()]
        table.add_row("mean", *means)
    return table


def _outlier_table(suite: AttentionSuite) -> Any:
    assert suite.outliers is not None
    found = suite.outliers
    table = _table(
        f"outliers: absolute activations of {found.tokens:,} tokens",
        1,
        *("", "top 1", "top 2", "top 3", "top 10", "top 100", "median"),
    )
    for name, values in (
        ("attention logits", found.attention_logits),
        ("hidden states", found.hidden_states),
    ):
        if values is not None:
            tops = (values.top_1, values.top_2, values.top_3, values.top_10, values.top_100)
            table.add_row(name, *(_size(size) for size in (*tops, values.median)))
    return table
