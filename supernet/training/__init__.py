"""Fine-tuning of the super-network and healing of sub-networks."""
