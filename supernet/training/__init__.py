"""Fine-tuning of the super-network and healing of what was cut out of it."""
