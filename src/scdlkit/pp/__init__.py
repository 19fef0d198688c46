"""Preprocessing: check the data, turn cells into tokens. Needs no PyTorch."""

from __future__ import annotations

from scdlkit.inspection import inspect_annotation_data

from ._tokenize import tokenize

__all__ = ["inspect_annotation_data", "tokenize"]
