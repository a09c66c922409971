"""Scoring with lm-eval, speed, pruning baselines, comparison."""
