"""nas-compressor's room for quantization, package layouts, verification, report, card, push."""
