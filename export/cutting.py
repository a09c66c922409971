"""One size of an elastic package as a package of its own, without the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from export.layouts.elastic import nearest_size, open_elastic
from export.package import write_package
from export.package_record import PackageRecord, check_files, read_record, update_record, write_card
from export.report.card import render_slice_card
from export.verify import verify
from supernet.common.errors import RequestError, VerificationError


def cut(package: Path, destination: Path, most: Callable[[int], int]) -> PackageRecord:
    """Write the largest size that has at most `most(parameters of the whole)` parameters to `destination`, and prove
    it; returns its record.

    It is read tensor by tensor, so no network is in memory as a whole before the proof. Raises `RequestError` where the
    package is no elastic one or is damaged, where no size is as small, and where the destination holds something else.
    """
    try:
        check_files(package)
    except VerificationError as error:  # of the package and not of this program
        raise RequestError(f"{error}; fetch or export the package again") from error
    if destination.resolve() == package.resolve():
        raise RequestError(f"{destination}: is the elastic package itself; name another folder")
    record, source = open_elastic(package)
    size = nearest_size(source.sizes, most(source.structure.parameters(source.structure.base)))
    dtype = getattr(torch, str(source.config.dtype).removeprefix("torch."))
    lineage = {key: value for key, value in record.lineage.model_dump(exclude_unset=True).items() if key in KEPT}
    write_package(
        source.size(size.architecture),
        destination,
        tokenizer=package,
        entry={"name": destination.resolve().name, "architecture": size.architecture.to_dict(), "params": size.params},
        dtype=dtype,
        lineage={**lineage, "cut_from": record.entry.name, "size": size.name},
        probe_ids=torch.tensor(record.probe.ids),
    )
    if record.entry.vocabulary is not None:  # the proof splits texts by it
        splits = [split.model_dump() for split in record.probe.splits]
        update_record(destination, entry={"vocabulary": record.entry.vocabulary.model_dump()}, probe={"splits": splits})
    verify(destination, record=True)
    card = render_slice_card(read_record(destination).entry, record, size, source.structure.base)
    write_card(destination, card)
    return read_record(destination)


KEPT = ("base", "supernet")
"""Of the elastic package's lineage, what a size has in common with it."""
