# SPDX-License-Identifier: Apache-2.0
"""What every room uses and what knows none of them: errors, progress, quantities, files."""

from __future__ import annotations
