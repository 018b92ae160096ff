"""What every room stands on: reading files with limits, and text safe to show.

Imports nothing of growkit but :mod:`growkit.errors`.
"""
