"""A page about one or several training runs: what grew, what it cost, and what became of it.

No torch: a report reads metrics and headers. matplotlib draws the figures.
"""

from __future__ import annotations

from growkit.report.page import write_report
from growkit.report.runs import Run, read_runs

__all__ = ["Run", "read_runs", "write_report"]
