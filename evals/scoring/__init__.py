"""Scores of networks on lm-eval tasks: documents and prompts, tokens, passes, metrics."""
