"""Quantized packages: the schemes, rounding that AutoRound tunes, GPTQ's, and rounding to nearest."""
