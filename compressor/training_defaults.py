"""Defaults of training that follow from a network's size: learning rates, and which optimizer."""

from __future__ import annotations

from math import inf

WARMUP_AFTER_REPAIR = 0.3
"""Share of the steps in which the rate of healing rises for a repaired network: what was given back must not be
undone."""
MUON_WIDTH = 1024
"""Residual width up to which Muon is the default: its matrix products are nearly half as many operations there as the
passes of a step of 4,096 tokens, and more in proportion to the width. Measured on widths of 64 to 576
(docs/results.md)."""
RATES = {"fine-tuning": 0.1, "adapters": 0.3, "healing": 0.2, "healing after repair": 0.1}
"""Peak learning rates times the residual width. A plain slice needs, and bears, a rate that would undo much of what a
whole or a repaired network knows; adapters alone, whose products start at zero, bear three times what whole weights
do."""


def learning_rate_for(what: str, hidden_size: int, weight_scale: float | None = None) -> float:
    """Peak learning rate of one of `RATES` by residual width, and by the root mean square of the weights where that is
    known: 1.6e-3 to fine-tune at width 64, 2.4e-5 at 4096.

    The inverse of the width is how the best rate of an Adam-like step falls for hidden weights (Yang et al., arXiv
    2203.03466); the constants were found on stories260K and prose-7m.

    A step of Adam moves every weight by about the rate, whatever its size. So a fine-tuning moves none by more than a
    hundredth of what is typical of them: babyllama-char361, whose weights are three times smaller than those of another
    network of its width, is lost otherwise (`docs/results.md`).
    """
    return RATES[what] * min(1 / hidden_size, weight_scale / 10 if weight_scale else inf)
