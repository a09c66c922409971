"""The elastic super-network: ordering by importance, activation of sub-networks as views, extraction."""
