"""The pictures of a report as inline SVG.

Every function returns markup without external resources: colours are CSS classes of the page, so that light and dark
mode both work, and what shows on hover is a `<title>`. All text that comes from outside is escaped. All pictures are
400 units wide, which a phone shows whole and a page for a desk beside one another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from markupsafe import Markup

from supernet.architecture import Architecture, LayerSizes

WIDTH = 400
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
MOST_COLUMNS = 24
SHADES = 7
LETTER = 7.3
"""Width of a letter at the pictures' font size, roughly: what keeps labels apart."""


Kind = Literal["screened", "point", "front", "chosen", "other", "ours", "base"]
"""What a dot is, in the order of drawing: the last hides the first. `screened`: measured on part of the documents;
`other` and `ours`: methods of a comparison; `chosen`: what was packaged."""


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot. `label` is written beside it where there is room; `title` shows on hover."""

    x: float
    y: float
    title: str = ""
    kind: Kind = "point"
    label: str = ""
    error: float = 0.0
    """Half the length of a bar along y, such as one standard error."""
    shade: int | None = None
    """Its colour on the ramp of shades, 1 to 7; None: the colour of its kind."""
    number: int | None = None
    """By which the page's script finds it."""


@dataclass(frozen=True)
class Ramp:
    """What the shades of a scatter plot mean: `name`, and the values of the first and the last shade as text."""

    name: str
    low: str
    high: str


def shades(
    values: Sequence[float | None], name: str, text: Callable[[float], str]
) -> tuple[list[int | None], Ramp | None]:
    """The shade of every value, 1 for the least to 7 for the most, and the ramp that says so.

    The ramp spans the middle nine tenths, so that a few far values do not take all colours. Where these are alike no
    value has a shade, and there is no ramp.
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return [None] * len(values), None
    cut = len(known) // 20
    low, high = known[cut], known[-1 - cut]
    if low == high:
        return [None] * len(values), None

    def shade(value: float) -> int:
        return min(SHADES, max(1, 1 + int(SHADES * (value - low) / (high - low))))

    ends = ("≤ " * (known[0] < low) + text(low), "≥ " * (known[-1] > high) + text(high))
    return [None if value is None else shade(value) for value in values], Ramp(name, *ends)


@dataclass(frozen=True)
class Line:
    """A named curve through `points` (x, y), drawn in the page's colour number `colour` (1 to 4)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1


@dataclass(frozen=True)
class _Axis:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        return f"{self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start):.1f}"


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(
    dots: Sequence[Dot],
    x_label: str,
    y_label: str,
    *,
    less_is_better: bool,
    limits: Sequence[float] = (),
    x_text: Callable[[float], str] | None = None,
    ramp: Ramp | None = None,
    stairs_of: Container[Kind] = ("base", "ours", "other"),
    height: int = 300,
) -> Markup:
    """Dots, with a staircase along those of the kinds `stairs_of` that no other of these dominates. The y axis is a
    share, such as quality, and more is better. Empty where all dots lie at one x: such a plot shows nothing.

    `limits` are vertical lines: the sizes that were asked for. `x_text` writes the ticks of the x axis.
    """
    if len({dot.x for dot in dots}) < 2:
        return Markup("")
    # 1. Axes, the meaning of the colours, and the sizes that were asked for.
    ends = [dot.y + sign * dot.error for dot in dots for sign in (-1, 1)]
    x_text = x_text or _tick_text
    x, y, parts = _frame([dot.x for dot in dots], ends, x_label, y_label, height, x_text, percent_tick)
    if ramp:
        parts += _ramp(ramp)
    parts += [
        Markup(
            '<line class="limit" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>asked for: at most {3}</title></line>'
        ).format(x(limit), TOP, height - BOTTOM, x_text(limit))
        for limit in limits
        if x.low <= limit <= x.high
    ]
    # 2. The staircase.
    stairs = undominated([(dot.x, dot.y) for dot in dots if dot.kind in stairs_of], less_is_better)
    corners = [
        *stairs[:1],
        *(c for a, b in pairwise(stairs) for c in ((b[0], a[1]) if less_is_better else (a[0], b[1]), b)),
    ]
    parts.append(
        Markup('<polyline class="stairs" points="{}"/>').format(" ".join(f"{x(a)},{y(b)}" for a, b in corners))
    )
    # 3. The dots, and then the labels that find room.
    ordered = sorted(dots, key=lambda dot: _DRAWN.index(dot.kind))
    for dot in ordered:
        if dot.error:
            parts.append(
                Markup('<line class="error" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                    x(dot.x), y(dot.y - dot.error), y(dot.y + dot.error)
                )
            )
        parts.append(_marker(dot, x(dot.x), y(dot.y)))
    placed = [(float(x(dot.x)), float(y(dot.y)), dot) for dot in ordered if dot.label or dot.kind == "front"]
    parts += _labels(sorted(placed, key=lambda place: _NAMED.index(place[2].kind)), height - BOTTOM)
    chosen_from = Markup(" data-plot") if any(dot.number is not None for dot in dots) else Markup("")
    return _svg(parts, height, f"{y_label} against {x_label}", chosen_from)


_DRAWN: tuple[Kind, ...] = get_args(Kind)
_NAMED: tuple[Kind, ...] = ("chosen", "base", "ours", "other", "front", "point", "screened")
_RADIUS = {"screened": 2.5, "point": 3.0, "front": 4.5, "other": 6.0, "ours": 6.0, "base": 5.0, "chosen": 7.0}


def _marker(dot: Dot, x: str, y: str) -> Markup:
    """A circle for what the search measured, a diamond for a method of a comparison, a square for the base."""
    css = dot.kind if dot.shade is None else f"{dot.kind} s{dot.shade}"
    number = "" if dot.number is None else Markup(' data-i="{}"').format(dot.number)
    r = _RADIUS[dot.kind]
    if dot.kind == "base":
        shape = Markup('<rect class="{}"{} x="{:.1f}" y="{:.1f}" width="{:g}" height="{:g}"').format(
            css, number, float(x) - r, float(y) - r, 2 * r, 2 * r
        )
    elif dot.kind in ("other", "ours"):
        path = f"M{x} {float(y) - r:.1f}l{r:g} {r:g}-{r:g} {r:g}-{r:g}-{r:g}z"
        shape = Markup('<path class="{}"{} d="{}"').format(css, number, path)
    else:
        shape = Markup('<circle class="{}"{} cx="{}" cy="{}" r="{:g}"').format(css, number, x, y, r)
    if not dot.title:
        return shape + Markup("/>")
    return shape + Markup("><title>{}</title></{}>").format(dot.title, shape[1:].partition(" ")[0])


def _labels(placed: Sequence[tuple[float, float, Dot]], bottom: float) -> list[Markup]:
    """Labels beside the dots (x, y, dot), where no other label or dot of these is. The first come first; one that finds
    no room is left out, since its dot says its name too."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in placed]
    parts = []
    for own, (x, y, dot) in enumerate(placed):
        width = 7.8 * len(dot.label)  # bold
        sides = (
            (x + 10, y + 4, "start", x + 10),
            (x - 10, y + 4, "end", x - 10 - width),
            (x, y - 11, "middle", x - width / 2),
            (x, y + 19, "middle", x - width / 2),
            (x + 8, y - 9, "start", x + 8),
            (x + 8, y + 17, "start", x + 8),
            (x - 8, y - 9, "end", x - 8 - width),
            (x - 8, y + 17, "end", x - 8 - width),
            (x + 8, y - 22, "start", x + 8),
            (x + 8, y + 30, "start", x + 8),
        )
        for at, line, anchor, left in sides if dot.label else ():
            box = (left, line - 10, left + width, line + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 12 and box[3] <= bottom
            free = not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                for index, other in enumerate(taken)
                if index != own
            )
            if inside and free:
                taken.append(box)
                parts.append(_text(f"{at:.1f}", f"{line:.1f}", dot.label, anchor, "label"))
                break
    return parts


def _ramp(ramp: Ramp) -> list[Markup]:
    """The shades in a row at the top right, between the texts of the least and the most value."""
    right = WIDTH - RIGHT - LETTER * len(ramp.high) - 4
    left = right - 9 * SHADES
    parts = [
        Markup('<rect class="s{}" x="{:.1f}" y="4" width="9" height="9"/>').format(shade, left + 9 * (shade - 1))
        for shade in range(1, SHADES + 1)
    ]
    return [
        *parts,
        _text(f"{left - 4:.1f}", 12, f"{ramp.name} {ramp.low}", "end"),
        _text(WIDTH - RIGHT, 12, ramp.high, "end"),
    ]


def undominated(points: Iterable[tuple[float, float]], less_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other dominates, in order of x: more y is better, and less (or more) x."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0] if less_is_better else -p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return sorted(front)


def lines(curves: Sequence[Line], x_label: str, y_label: str, height: int = 220) -> Markup:
    """Curves with a dot at every value, and a legend on top if there are several. Empty where all values lie at one x:
    one dot on an axis shows nothing."""
    values = [point for curve in curves for point in curve.points]
    if len({x for x, _ in values}) < 2:
        return Markup("")
    x, y, parts = _frame([v[0] for v in values], [v[1] for v in values], x_label, y_label, height)
    for curve in curves:
        path = " ".join(f"{x(a)},{y(b)}" for a, b in curve.points)
        parts.append(Markup('<polyline class="curve c{}" points="{}"/>').format(curve.colour, path))
        if len(curve.points) <= 60:
            parts += [
                Markup('<circle class="f{}" cx="{}" cy="{}" r="3"><title>{}: {} at {}</title></circle>').format(
                    curve.colour, x(a), y(b), curve.name, _tick_text(b), _tick_text(a)
                )
                for a, b in curve.points
            ]
    if len(curves) > 1:
        at: float = WIDTH - RIGHT
        for curve in reversed(curves):
            at -= LETTER * len(curve.name)
            parts.append(
                Markup(
                    '<rect class="f{}" x="{:.1f}" y="3" width="10" height="10" rx="2"/>'
                    '<text x="{:.1f}" y="12">{}</text>'
                ).format(curve.colour, at - 14, at, curve.name)
            )
            at -= 24
    return _svg(parts, height, f"{y_label} against {x_label}")


def architecture_picture(architecture: Architecture, base: Architecture) -> Markup:
    """Layers from left to right: key-value heads above, FFN width below, the base as outline behind."""
    depth = len(base.layers)
    step = (WIDTH - LEFT - RIGHT) / depth
    bar = min(step * 0.72, 44)
    panels: list[tuple[str, str, int, int]] = [
        ("KV heads", "num_key_value_heads", TOP, 60),
        ("FFN width", "intermediate_size", TOP + 60 + 28, 100),
    ]
    parts: list[Markup] = []
    for name, attribute, top, height in panels:
        # 1. The panel's scale and name.
        most = max(getattr(layer, attribute) for layer in base.layers) or 1
        bottom = top + height
        parts += [_text(LEFT - 8, top + 10, most, "end"), _text(LEFT - 8, bottom, 0, "end")]
        parts.append(_text(LEFT, top - 8, name, "start"))
        # 2. A bar for every layer in the outline of the base's, cut between key-value heads, and a cross where removed.
        for index, (layer, full) in enumerate(zip(architecture.layers, base.layers, strict=True)):
            left = LEFT + index * step + (step - bar) / 2
            kept, whole = getattr(layer, attribute), getattr(full, attribute)
            parts.append(Markup("<g><title>{}</title>").format(layer_text(index, layer, full)))
            for css, amount in (("outline", whole), ("bar", kept)):
                if amount:
                    tall = height * amount / most
                    parts.append(
                        Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                            css, left, bottom - tall, bar, tall
                        )
                    )
            if attribute == "num_key_value_heads" and bar > 6 and whole <= 16:
                parts += [
                    Markup('<line class="cut" x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/>').format(
                        left, left + bar, bottom - height * group / most
                    )
                    for group in range(1, kept)
                ]
            if whole and not kept:
                parts.append(_text(f"{left + bar / 2:.1f}", f"{bottom - 5:.1f}", "✕", css="gone"))
            parts.append(Markup("</g>"))
    # 3. The layers' numbers.
    bottom = TOP + 60 + 28 + 100
    every = max(1, math.ceil(depth / 16))
    parts += [_text(f"{LEFT + (index + 0.5) * step:.1f}", bottom + 16, index) for index in range(0, depth, every)]
    parts.append(_text((LEFT + WIDTH) / 2, bottom + 34, "layer of the base"))
    return _svg(parts, bottom + 42, "sizes of every layer")


def layer_text(index: int, layer: LayerSizes, full: LayerSizes) -> str:
    """What is left of one layer, in words."""
    if layer.removed:
        return f"layer {index}: removed"
    attention, mlp, experts = "attention removed", "FFN removed", ""
    if layer.num_key_value_heads:
        attention = (
            f"{layer.num_key_value_heads} of {full.num_key_value_heads} KV heads "
            f"({layer.num_attention_heads} of {full.num_attention_heads} query heads)"
        )
    if layer.intermediate_size:
        mlp = f"FFN width {layer.intermediate_size} of {full.intermediate_size}"
    if layer.num_experts:
        experts = f", {layer.num_experts} of {full.num_experts} experts"
    return f"layer {index}: {attention}, {mlp}{experts}"


def usage_map(architectures: Sequence[Architecture], attribute: str, declared: Iterable[int] = ()) -> Markup:
    """How often each value of one size appears in `architectures`: a row for each layer, a column for each value.

    `declared` are values of the search space, which need not appear. The darker the cell, the more often; the number is
    the percentage. Neighbouring values share a column if there are many.
    """
    # 1. Columns; removed blocks have their own.
    values = sorted({getattr(layer, attribute) for arch in architectures for layer in arch.layers} | set(declared))
    together = math.ceil(len(values) / MOST_COLUMNS)
    gone, rest = values[: values[0] == 0], values[values[0] == 0 :]
    columns = [gone] * bool(gone) + [rest[i : i + together] for i in range(0, len(rest), together)]
    names = ["gone" if column == [0] else " to ".join(map(str, sorted({column[0], column[-1]}))) for column in columns]
    depth = len(architectures[0].layers)
    width = min((WIDTH - LEFT - RIGHT) / len(columns), 72)
    height = 18 if depth <= 40 else 10
    parts: list[Markup] = []
    every = max(1, math.ceil(len(columns) * 40 / (WIDTH - LEFT - RIGHT)))
    for index, column in enumerate(columns):
        if index % every == 0:
            heading = "gone" if column == [0] else column[0]
            parts.append(_text(f"{LEFT + (index + 0.5) * width:.1f}", 11, heading))
    # 2. A row for each layer; numbers are drawn last, above the cells.
    texts: list[Markup] = []
    parts.append(Markup('<g stroke-width="{}">').format(height - 1))
    for row in range(depth):
        times = Counter(getattr(arch.layers[row], attribute) for arch in architectures)
        middle = 18 + (row + 0.5) * height
        if height > 10 or row % 2 == 0:
            texts.append(_text(LEFT - 8, f"{middle + 4:.0f}", row, "end"))
        parts.append(Markup('<path class="row" d="M{} {:g}h{:.0f}"/>').format(LEFT, middle, width * len(columns)))
        for index, column in enumerate(columns):
            count = sum(times[value] for value in column)
            if not count:
                continue
            share = count / len(architectures)
            parts.append(
                Markup('<path class="cell" opacity="{:.2f}" d="M{:.1f} {:g}h{:.1f}"><title>{}</title></path>').format(
                    0.08 + 0.92 * share,
                    LEFT + index * width + 0.5,
                    middle,
                    width - 1,
                    f"layer {row}: {names[index]} in {count} of {len(architectures)}",
                )
            )
            if height > 10 and width >= 20:
                centre, css = f"{LEFT + (index + 0.5) * width:.1f}", "on-dark" if share > 0.6 else "on-light"
                texts.append(_text(centre, f"{middle + 4:.0f}", f"{100 * share:.0f}", css=css))
    parts.append(Markup("</g>"))
    return _svg([*parts, *texts], 18 + depth * height + 4, "how often each value appears on the front")


def _frame(
    xs: Sequence[float],
    ys: Sequence[float],
    x_label: str,
    y_label: str,
    height: int,
    x_text: Callable[[float], str] | None = None,
    y_text: Callable[[float], str] | None = None,
) -> tuple[_Axis, _Axis, list[Markup]]:
    """Both axes, and the markup of their ticks and labels; an x axis of whole numbers has ticks at these only."""
    x = _Axis(*_padded(xs), LEFT, WIDTH - RIGHT)
    y = _Axis(*_padded(ys), height - BOTTOM, TOP)
    parts = []
    for tick in ticks(y.low, y.high, 5):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y(tick), y(tick))
        )
        parts.append(_text(LEFT - 6, f"{float(y(tick)) + 4:.1f}", (y_text or _tick_text)(tick), "end"))
    whole = all(float(value).is_integer() for value in xs)
    for tick in ticks(x.low, x.high, 7):
        if whole and not math.isclose(tick, round(tick), abs_tol=1e-9):
            continue
        parts.append(_text(x(tick), height - BOTTOM + 17, (x_text or _tick_text)(tick)))
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, height - BOTTOM, height - BOTTOM
        )
    )
    parts.append(_text((LEFT + WIDTH) / 2, height - 6, x_label))
    parts.append(_text(2, 12, y_label, "start"))
    return x, y, parts


def _text(x: float | str, y: float | str, content: object, anchor: str = "middle", css: str = "") -> Markup:
    kind = Markup(' class="{}"').format(css) if css else ""
    return Markup('<text{} x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, content)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def percent_tick(value: float) -> str:
    """A share as a tick of an axis: `40 %`."""
    return f"{100 * value:.4g} %"


def times_tick(value: float) -> str:
    """A multiple as a tick of an axis: 1.5 and a multiplication sign."""
    return f"{value:.3g}\N{MULTIPLICATION SIGN}"


def _tick_text(value: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _svg(parts: Sequence[Markup], height: float, description: str, mark: str = "") -> Markup:
    return Markup('<svg{} viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        mark, WIDTH, height, description, Markup("").join(parts)
    )
