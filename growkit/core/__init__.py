# SPDX-License-Identifier: Apache-2.0
"""Readers that every room uses: regular files, JSON and YAML, all within limits.

Imports nothing of growkit but ``growkit.errors``.
"""
