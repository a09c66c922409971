"""Quantization, package layouts, verification, report, card, push."""
