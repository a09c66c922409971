"""What a CPU holds at once: parts of a batch."""

from __future__ import annotations

import pytest
import torch

from supernet.device import ACTIVATION_BYTES, activation_bytes, parts_of_batch
from supernet.families import describe
from tests.support.tiny_families import CONFIGS

CPU = torch.device("cpu")


def test_bytes_by_hand() -> None:
    """Two layers of width 48 and 56 neurons, 101 tokens."""
    structure = describe(CONFIGS["llama"]())
    layers = len(structure.base.layers)
    kept = layers * (10 * 48 + 4 * 56)
    assert activation_bytes(structure, 10) == 4 * 10 * (kept + 4 * 101)
    # Of all logits, those of two tokens at a time.
    assert activation_bytes(structure, 10, logits=202) == 4 * (10 * kept + 4 * 202)


@pytest.mark.parametrize("rows", [1, 4, 6, 16])
@pytest.mark.parametrize("rows_that_fit", [0.5, 1.0, 3.5, 100.0])
def test_parts_are_equal_and_fit(rows: int, rows_that_fit: float) -> None:
    structure = describe(CONFIGS["llama"]())
    length = int(ACTIVATION_BYTES / rows_that_fit / activation_bytes(structure, 1))
    parts = parts_of_batch(structure, rows, length, CPU)
    assert rows % parts == 0
    assert parts == rows or activation_bytes(structure, rows // parts * length) <= ACTIVATION_BYTES
    fewer = [n for n in range(1, parts) if rows % n == 0]
    assert all(activation_bytes(structure, rows // n * length) > ACTIVATION_BYTES for n in fewer)
    assert parts_of_batch(structure, rows, length, torch.device("cuda")) == 1
