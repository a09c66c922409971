"""The front as the report shows it: two plots over the axes that people choose by, a table, and the numbers of both.

The search has three objectives or more, and its front drawn on two axes looks like scatter. So each plot has the front
of its own two axes, and its colour is the third. Every dot has a number, by which the page's script finds what is known
of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Any

from markupsafe import Markup

from export.report.comparison import summarize
from export.report.plots import Dot, Kind, percent_tick, scatter, shades, times_tick, undominated
from export.report.schema import MeasuredNetwork, Package, Point, Report
from search.scores import Score
from supernet.architecture import Architecture
from supernet.common.formatting import count, parse_parameters, percent, rate

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass
class Item:
    """One network of the view: a dot in both plots, a card, and a row of the table where it is on a front."""

    kind: Kind
    name: str
    """Of the packages made of it, of the method that made it, or `base`; empty for others."""
    params: int
    quality: float
    speedup: float | None
    """Decode speed as a multiple of the base's; predicted from speed.json, or measured of what was healed."""
    key: str = ""
    error: float | None = None
    """One standard error of the quality, where it is known."""
    about: str = ""
    decode_tps: float | None = None
    architecture: Architecture | None = None
    tasks: dict[str, Score] = field(default_factory=dict)
    further: dict[str, float] = field(default_factory=dict)
    on_front: bool = False
    """Of the search's front, of all objectives, or of that of two axes."""

    @property
    def searched(self) -> bool:
        return self.kind in ("screened", "point", "front", "chosen")

    @property
    def layers(self) -> str:
        """Layers of which something is left, of the base's."""
        sizes = self.architecture
        return f"{len(sizes.kept)} of {len(sizes.layers)}" if sizes else ""


@dataclass(frozen=True)
class FrontView:
    """What the template needs of the front. `rows` are the numbers and items of the table's rows, smallest first."""

    plots: dict[str, Markup]
    rows: list[tuple[int, Item]]
    further: list[str]
    below: int
    """Networks that the plots leave out, being below `floor` in quality."""
    floor: float
    kinds: frozenset[Kind]
    data: dict[str, Any]
    """For the page's script."""


def front_view(report: Report) -> FrontView | None:
    """Plots, table and data of what was measured; None where no search has measured anything."""
    items = _items(report)
    if not any(item.searched for item in items):
        return None
    floor = _floor(items)
    plots = {}
    for name, less_is_better in (("params", True), ("speed", False)):
        if plot := _plot(items, report, less_is_better, floor):
            plots[name] = plot
    further = list(dict.fromkeys(name for item in items for name in item.further))
    shown = [(n, item) for n, item in enumerate(items) if item.on_front or not item.searched or item.kind == "chosen"]
    return FrontView(
        plots=plots,
        rows=sorted(shown, key=lambda row: (row[1].params, row[0])),
        further=further,
        below=sum(item.quality < floor for item in items),
        floor=floor,
        kinds=frozenset(item.kind for item in items),
        data=_data(items, report, further),
    )


def _items(report: Report) -> list[Item]:
    """The base, every measured sub-network, and the methods of the comparison."""
    base = report.base
    base_tps = report.search.base_decode_tps if report.search else None
    items = [
        Item("base", "base", base.params, 1.0, 1.0, decode_tps=base_tps, architecture=base.architecture)
    ]  # its scores are of the report split, and stand in the table of results
    items += _measured_items(report, base_tps)
    for less_is_better in (True, False):
        _mark_front(items, less_is_better)
    return items + _compared_items(report)


def _measured_items(report: Report, base_tps: float | None) -> list[Item]:
    """Every sub-network that the search measured; without a search, those on the front. `base_tps`: the base's decode
    speed by the layers' timings."""
    packaged: dict[str, list[Package]] = {}
    for package in report.packages:
        bits = package.quantization_report and package.quantization_report.bits
        if package.quantization is None or bits:
            packaged.setdefault((bits or package.architecture).key, []).append(package)
    front = {network.key for network in report.front}
    items = []
    networks: Sequence[MeasuredNetwork] = report.search.points if report.search else report.front
    for network in networks:
        full = not isinstance(network, Point) or network.full
        chosen = packaged.get(network.architecture.key, [])
        about = [f"generation {network.generation}"] if isinstance(network, Point) else []
        if chosen:
            about.append(f"packaged with quality {percent(chosen[0].quality)} on the report split")
        tps = network.decode_tps
        items.append(
            Item(
                kind="chosen" if chosen else "point" if full else "screened",
                name=", ".join(package.name for package in chosen),
                params=network.params,
                quality=network.quality,
                speedup=tps / base_tps if tps is not None and base_tps else None,
                key=network.key,
                about="; ".join(about),
                decode_tps=tps,
                architecture=network.architecture,
                tasks=network.tasks,
                further=network.further,
                on_front=network.key in front or (isinstance(network, Point) and network.on_front),
            )
        )
    return items


def _compared_items(report: Report) -> list[Item]:
    """The methods of the comparison, at every size."""
    rows = {(row.method, row.size): row for row in reversed(report.comparison)}
    tables = summarize(report.comparison)
    return [
        Item(
            kind="ours" if method.ours else "other",
            name=f"{method.method} {method.size}" if method.size and len(tables) > 1 else method.method,
            params=method.params,
            quality=method.quality,
            speedup=method.speedup,
            error=method.stderr,
            about=f"{method.about}; healed, on the report split",
            decode_tps=method.decode_tps,
            architecture=rows[method.method, method.size].architecture,
            tasks=dict(method.tasks),
        )
        for table in tables
        for method in table
    ]


def _x(item: Item, report: Report, by_params: bool) -> float | None:
    return item.params / report.base.params if by_params else item.speedup


def _mark_front(items: Sequence[Item], by_params: bool) -> None:
    """Note which fully measured sub-networks no other dominates on the two axes of a plot."""
    measured = [item for item in items if item.kind in ("point", "front", "chosen")]
    placed = [(x, item) for item in measured if (x := item.params if by_params else item.speedup) is not None]
    best = set(undominated([(x, item.quality) for x, item in placed], by_params))
    for x, item in placed:
        if (x, item.quality) in best:
            item.on_front = True


def _plot(items: Sequence[Item], report: Report, by_params: bool, floor: float) -> Markup:
    """Quality from `floor` on against size, or against speed: coloured by the other of the two. Empty where there is
    nothing to see."""
    found = [(n, item, x) for n, item in enumerate(items) if (x := _x(item, report, by_params)) is not None]
    placed = [(n, item, x) for n, item, x in found if item.quality >= floor]
    if not any(item.searched for _, item, _ in placed):
        return Markup("")
    colours, ramp = shades(
        [_x(item, report, not by_params) if item.searched else None for _, item, _ in placed],
        "speed" if by_params else "size",
        times_tick if by_params else percent,
    )
    measured = [(x, item.quality) for _, item, x in placed if item.kind in ("base", "point", "chosen")]
    best = set(undominated(measured, by_params))
    dots = [
        Dot(
            x=x,
            y=item.quality,
            kind="front" if item.kind == "point" and (x, item.quality) in best else item.kind,
            label=item.name if item.kind != "ours" else "",
            error=item.error or 0.0,
            shade=shade,
            number=n,
        )
        for (n, item, x), shade in zip(placed, colours, strict=True)
    ]
    return scatter(
        dots,
        "parameters, share of the base's" if by_params else "decode speed, multiple of the base's",
        "quality",
        less_is_better=by_params,
        limits=_size_limits(report) if by_params else (),
        x_text=percent_tick if by_params else times_tick,
        ramp=ramp,
        stairs_of=("base", "point", "front", "chosen"),  # scored in full, on the search split
    )


def _floor(items: Sequence[Item]) -> float:
    """The quality from which on the plots draw: a quarter of the base's below the worst that was packaged or compared,
    so that the networks that do not work leave room to those that do."""
    named = [item.quality for item in items if item.name]
    return min(named) - 0.25 if len(named) > 1 else -math.inf


def _size_limits(report: Report) -> list[float]:
    """The sizes that were asked for, as shares of the base."""
    sizes = (report.search.targets.get("max_params") if report.search else None) or []
    limits = []
    for text in sizes if isinstance(sizes, list) else [sizes]:
        with suppress(ValueError):  # a report that was edited by hand
            limits.append(parse_parameters(str(text), report.base.params) / report.base.params)
    return limits


def _data(items: Sequence[Item], report: Report, further: Sequence[str]) -> dict[str, Any]:
    """What the page's script shows in cards and in the whole table: a row of `columns` for each of `items`.

    Layers repeat: `sizes` lists the different ones (the fields of `LayerSizes`, in order), and a network is a word
    of their numbers in base 36, `digits` characters for each layer.
    """
    kinds: dict[tuple[int, ...], int] = {}

    def word(architecture: Architecture) -> list[int]:
        return [kinds.setdefault(astuple(layer), len(kinds)) for layer in architecture.layers]

    numbers = [word(item.architecture) if item.architecture else None for item in items]
    digits = next(n for n in range(1, 9) if 36**n >= len(kinds))
    tasks = list(dict.fromkeys(task for item in items for task in item.tasks))

    def written(layers: Sequence[int]) -> str:
        return "".join(DIGITS[number // 36**place % 36] for number in layers for place in reversed(range(digits)))

    return {
        "base": {"params": report.base.params, "layers": len(report.base.architecture.layers)},
        "tasks": tasks,
        "further": list(further),
        "digits": digits,
        "sizes": [list(sizes) for sizes in kinds],
        "columns": [
            "kind",
            "name",
            "key",
            "about",
            "params",
            "quality",
            "speed",
            "speedup",
            "layers",
            "tasks",
            "further",
        ],
        "items": [
            [
                item.kind,
                item.name,
                item.key,
                item.about,
                [item.params, count(item.params)],
                [round(item.quality, 4), quality_text(item)],
                speed_text(item) or None,
                None if item.speedup is None else round(item.speedup, 4),
                None if layers is None else written(layers),
                [item.tasks[task].text if task in item.tasks else "" for task in tasks],
                [round(item.further[name], 4) if name in item.further else None for name in further],
            ]
            for item, layers in zip(items, numbers, strict=True)
        ],
    }


def quality_text(item: Item) -> str:
    """The quality as a percentage, with one standard error where it is known."""
    return percent(item.quality) + (f" ± {100 * item.error:.1f}" if item.error else "")


def speed_text(item: Item) -> str:
    """Decode speed as a multiple of the base's and in tokens per second, as far as they are known."""
    parts = [] if item.speedup is None else [f"{item.speedup:.2f}\N{MULTIPLICATION SIGN}"]
    parts += [] if item.decode_tps is None else [f"{rate(item.decode_tps)} tokens/s"]
    return ", ".join(parts)
