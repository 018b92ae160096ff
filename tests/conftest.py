"""Tests of several rooms share the tiny checkpoints of ``tiny_checkpoints.py``."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
