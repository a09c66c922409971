"""What the other preferences would have picked, in sentences for the terminal and the page."""

from __future__ import annotations

from export.report.schema import Report
from supernet.common.formatting import count, percent


def in_words(params: float, of_base: int, quality: float, held_out_loss: float | None, speedup: float | None) -> str:
    """A measured network: its size beside `of_base` parameters, quality, held-out loss in nats per token, and decode
    speed over the base's; what is None is left out."""
    parts = [
        f"{count(params)} parameters ({percent(params / of_base)} of the base)",
        f"quality {quality:.3f} on the search's documents before healing",
    ]
    if held_out_loss is not None:
        parts.append(f"held-out loss {held_out_loss:.3f}")
    if speedup is not None:
        parts.append(f"{speedup:.2f} times as fast as the base by its layers' timings")
    return ", ".join(parts)


def alternatives(report: Report) -> list[str]:
    """A sentence for each network that another preference would have picked, with the commands that make it; and, where
    there is a package of llama.cpp's, what the speeds of a search are of."""
    lines = []
    for other in report.alternatives:
        network = in_words(other.params, report.base.params, other.quality, other.held_out_loss, other.speedup)
        lines.append(f"Preferred for {other.prefer}, {other.name} would be another: {network}: {other.command}.")
    if report.search is not None and any(package.layout == "gguf" for package in report.packages):
        lines.append(
            "The speeds that the search compared are of layers in transformers; llama.cpp's were measured of the "
            "packages only."
        )
    return lines
