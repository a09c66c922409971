"""Whether pruning gained anything: the compressed networks beside the base itself in few bits, in words."""

from __future__ import annotations

from export.report.schema import Package, Report
from supernet.common.formatting import percent, size

EQUAL = 1.005
"""Files that are larger by less than this factor count as equally large."""


def quantized_base_sentences(report: Report) -> list[str]:
    """A sentence for every package that the base in few bits beats in no more bytes, and where none is beaten, one that
    says so; nothing where no such base was proved."""
    shipped = [package for package in report.packages if not package.refused]
    beaten = [(package, best) for package in shipped if (best := better_base(report, package)) is not None]
    if not shipped or not any(base.verified for base in report.quantized_base):
        return []
    if not beaten:
        return ["No package is beaten by the base itself in few bits at equal bytes."]
    return [
        f"The {best.label} takes {size(best.bytes)} on disk, no more than {package.label} ({size(package.bytes)}), and "
        f"keeps {percent(best.quality)} of the quality instead of {percent(package.quality)}: at these bytes, pruning "
        "gained nothing."
        for package, best in beaten
    ]


def better_base(report: Report, package: Package) -> Package | None:
    """The base in few bits that is no larger than a package and has a higher quality and no higher loss on text (where
    both are known): of several the best, of equals the smallest."""

    def beats(base: Package) -> bool:
        losses = (base.held_out_loss, package.held_out_loss)
        lower = None in losses or losses[0] <= losses[1]  # type: ignore[operator]
        return base.bytes <= EQUAL * package.bytes and base.quality > package.quality and lower

    proved = [base for base in report.quantized_base if base.verified]
    return min(filter(beats, proved), key=lambda base: (-base.quality, base.bytes), default=None)
