"""What several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support import tiny


@pytest.fixture
def network(tmp_path: Path) -> PreTrainedModel:
    """A tiny random Llama, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "m"), dtype=torch.float32)
