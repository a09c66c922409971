"""The elastic super-network: checkpoints and families, ordering, activation, slicing and training."""
