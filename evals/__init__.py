"""nas-compressor's room for lm-eval scoring, speed, pruning baselines, comparison."""
