"""A plan as rich tables: what ``plan`` shows and ``grow`` ends with."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from growkit.core.quantities import human_bytes, human_count

# style, word, what it means
EXACTNESS_TEXT = {
    "bit-exact": ("green", "bit-exact", "same numbers, or zeros added"),
    "exact": ("green", "exact", "equal up to the order of floating-point sums"),
    "rounded": ("yellow", "rounded", "exact algebra, new weights rounded to the stored dtype"),
    "not-exact": ("red", "not exact", "another function, to be trained"),
}


def plan_tables(report: dict[str, Any]) -> list[Table]:
    """Tables of :func:`growkit.record.plan_report.plan_report`."""
    return [_axes(report), _tensors(report)]


def _axes(report: dict[str, Any]) -> Table:
    family = report["family"]
    title = (
        family if family == report["source_family"] else f"{report['source_family']} -> {family}"
    )
    if origin := report.get("family_origin"):
        title += f" ({origin})"
    table = Table(title=f"plan: {title}", title_justify="left")
    table.add_column("axis")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("", justify="right")
    for sizes in report["axes"].values():
        _change(table, sizes["label"], sizes["before"], sizes["after"], "{:,}".format)
    tied = report["tied_embeddings"]
    if tied["before"] != tied["after"]:
        table.add_row("embeddings", "tied", "untied", "")
    table.add_section()
    before, after = report["before"], report["after"]
    for key, label, form in (
        ("parameters", "parameters", human_count),
        ("non_embedding_parameters", "  without embeddings", human_count),
        ("active_parameters", "  active parameters", human_count),
        ("flops_per_token", f"forward FLOPs per token at {after['context']}", human_count),
        ("kv_cache_bytes_per_token", "KV cache per token", human_bytes),
    ):
        if key == "active_parameters" and after[key] == after["parameters"]:
            continue  # no experts
        _change(table, label, before[key], after[key], form)
    _change(table, "weights on disk", report["bytes_in"], report["bytes_out"], human_bytes)
    return table


def _change(table: Table, label: str, before: float, after: float, form: Any) -> None:
    factor: str | Text = ""
    if before != after and before and after:
        times = f"{after / before:.4g}"
        more = f"{'+' if after > before else '-'}{form(abs(after - before))}"
        factor = Text(f"x{times}" if times != "1" else more, style="bold")
    shown = [form(value) if value else "-" for value in (before, after)]
    table.add_row(label, *shown, factor)


def _tensors(report: dict[str, Any]) -> Table:
    table = Table(title="how", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for step in report["operators"]:
        table.add_row(step["operator"], f"{step['summary']}; {step['exactness']}")
    counts = [f"{n} {action}" for action, n in report["tensors"].items() if action != "total"]
    table.add_row("tensors", f"{report['tensors']['total']}: {', '.join(counts)}")
    symmetry = report["symmetry"]
    if report["noise_snr_db"] is not None:
        symmetry += f" at {report['noise_snr_db']:g} dB"
    if warm := report.get("warm_start"):
        factors = f"shrink {warm['shrink']:g}, perturb {warm['perturb']:g}, seed {report['seed']}"
        table.add_row("warm start", factors)
    else:
        table.add_row("symmetry of copies", _symmetry(report, symmetry))
    table.add_row("disk needed", human_bytes(report["bytes_out"]))
    style, word, meaning = EXACTNESS_TEXT[report["exactness"]]
    table.add_row("function", Text.assemble((word, style), f" ({meaning})"))
    return table


def _symmetry(report: dict[str, Any], asked: str) -> str:
    """How copies part, and which do not."""
    shared = f"{asked}, seed {report['seed']}"
    if not report.get("tied_copies"):
        return shared
    tied = ", ".join(axis.replace("_", " ") + "s" for axis in report["tied_copies"])
    others = f"{shared}; " if report["shared_copies"] else ""
    return f"{others}none: the {tied} past 1:1 stay equal"
