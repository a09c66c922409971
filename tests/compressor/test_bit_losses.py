"""What bits cost, of widths that hold them and of others."""

from __future__ import annotations

import torch

from compressor.stages.bit_losses import holds_bits, in_groups_of
from export.quantization.rounded_variants import in_groups
from supernet.families import describe
from tests.support.export_networks import tiny_llama


def test_a_width_that_holds_no_two_bits_costs_what_they_would() -> None:
    """44 neurons are stored in 8 bits where 2 are asked for; 32 of them, in a smaller sub-network, are stored in 2."""
    weight = torch.randn(64, 44, generator=torch.Generator().manual_seed(0))
    rounding = in_groups_of(32)
    assert torch.equal(in_groups(weight, 2, 32), in_groups(weight, 8, 32))
    asked = rounding.as_asked(weight, 2)
    assert asked.shape == weight.shape
    assert torch.equal(asked[:, :32], in_groups(weight[:, :32].contiguous(), 2, 32))
    assert len(asked[0, 32:].unique()) <= 4  # two bits of the rest too
    whole = weight[:, :32].contiguous()
    assert torch.equal(rounding.as_asked(whole, 4), in_groups(whole, 4, 32))


def test_which_widths_hold_bits() -> None:
    """Measured costs of a base whose widths do are those of earlier versions."""
    for neurons, block, held in ((96, 32, True), (96, 64, False), (44, 32, False)):
        structure = describe(tiny_llama(hidden_size=64, head_dim=32, intermediate_size=neurons).config)
        assert holds_bits(structure, block) == held
