"""What the other preferences would have picked, in sentences for the terminal and the page."""

from __future__ import annotations

from export.report.schema import Report
from supernet.common.formatting import count, percent


def alternatives(report: Report) -> list[str]:
    """A sentence for each network that another preference would have picked, with the commands that make it; and, where
    there is a package of llama.cpp's, what the speeds of a search are of."""
    lines = []
    for other in report.alternatives:
        numbers = [
            f"{count(other.params)} parameters ({percent(other.params / report.base.params)} of the base)",
            f"quality {other.quality:.3f} on the search's documents before healing",
        ]
        if other.held_out_loss is not None:
            numbers.append(f"held-out loss {other.held_out_loss:.3f}")
        if other.speedup is not None:
            numbers.append(f"{other.speedup:.2f} times as fast as the base by its layers' timings")
        lines.append(
            f"Preferred for {other.prefer}, {other.name} would be another: {', '.join(numbers)}: {other.command}."
        )
    if report.search is not None and any(package.layout == "gguf" for package in report.packages):
        lines.append(
            "The speeds that the search compared are of layers in transformers; llama.cpp's were measured of the "
            "packages only."
        )
    return lines
