"""Quantized packages: the schemes, tuned rounding through AutoRound, and rounding to nearest."""
