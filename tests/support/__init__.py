"""Tiny networks, tokenizers, tasks and reports that the tests share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's root."""
