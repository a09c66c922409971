"""Fine-tuning: data, which sub-networks take part in a step, what they learn from, and the loop."""
