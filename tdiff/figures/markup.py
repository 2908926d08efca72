"""The small pieces of the report's page: escaped text, images, tables, bars, line charts."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

import numpy as np

from tdiff.figures.contents import Chart, Mean, Pixels, Table
from tdiff.figures.plots import percent
from tdiff.figures.sheets import Sheet, sheet

POINTS = 160
"""Points that a line is drawn with, at most: each is then the mean of its neighbours."""

LINES = 8
"""Colours of lines in report.css."""


def text(value: object) -> str:
    """A value as HTML that shows it and does nothing else, in attributes too."""
    # A lone surrogate, which JSON may bring, has no place in UTF-8.
    return html.escape(str(value).encode("utf-8", "replace").decode())


def share(part: float) -> str:
    """A share in [0, 1]: '12%', '0.4%', '<0.1%'."""
    return "<0.1%" if 0 < part < 0.0005 else percent(part)


def picture(images: Sheet, alt: str, css: str = "sheet", name: str = "", width: float | None = None) -> str:
    """The sheet as an image, `width` CSS pixels wide; without one, over the width at which its pixels stay squares."""
    across, down = images.size
    known = f' id="{name}"' if name else ""
    return (
        f'<img{known} class="{css}" src="{images.uri}" alt="{text(alt)}" width="{across}" height="{down}" '
        f'style="width:{images.shown_width if width is None else width:g}px">'
    )


def strip(title: str, images: Pixels, alt: str, name: str = "") -> str:
    """Images under a title; nothing where there are none."""
    if not len(images):
        return ""
    shown = picture(sheet(images, 8), alt, name=name)
    return f'<figure class="strip"><figcaption>{text(title)}</figcaption>{shown}</figure>'


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header and whose first column names the others."""
    header, *body = rows
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(_minus(cell))}</td>" for cell in rest)}</tr>'
        for first, *rest in body
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(title)}"><table><caption><span>{text(title)}'
        f"</span></caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def tables(found: Sequence[Table]) -> str:
    return f'<div class="tables">{"".join(table(title, rows) for title, rows in found)}</div>' if found else ""


def _minus(cell: str) -> str:
    """A negative number with a minus as wide as the other digits."""
    return "−" + cell[1:] if re.match(r"-\d", cell) else cell


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values; the values may hold HTML."""
    return f'<dl class="facts">{"".join(f"<div><dt>{text(a)}</dt><dd>{b}</dd></div>" for a, b in pairs)}</dl>'


def mean(value: Mean, unit: str) -> str:
    """'−23.41 ± 0.52 nats' as text."""
    error = "" if value.standard_error is None else f" ± {value.standard_error:.2f}"
    return f"{value.value:.2f}{error} {unit}".replace("-", "−")


# --- bars --------------------------------------------------------------------------------------------


def class_name(names: Sequence[str], k: int) -> str:
    return names[k] if k < len(names) else str(k)


def bars(counts: Sequence[int], names: Sequence[str], title: str, most: int = 12) -> str:
    """A histogram of classes, largest first, as a table whose bars are drawn by CSS; what is rare is put together."""
    total = sum(counts)
    order = [k for k in sorted(range(len(counts)), key=lambda k: -counts[k]) if counts[k]]
    rows = [(f"<bdi>{text(class_name(names, k))}</bdi>", int(counts[k])) for k in order[:most]]
    if len(order) > most:
        rest = order[most:]
        rows.append((f"{len(rest)} other classes", int(sum(counts[k] for k in rest))))
    if not rows:
        return ""
    peak = max(count for _, count in rows)
    lines = "".join(
        f'<tr><th scope="row">{name}</th><td class="bar"><span style="width:{100 * count / peak:.1f}%"></span></td>'
        f"<td>{count:,}</td><td>{text(share(count / total))}</td></tr>"
        for name, count in rows
    )
    head = "".join(f'<th scope="col"{css}>{name}</th>' for name, css in _HEADS)
    return (
        f'<table class="bars"><caption>{text(title)}</caption><thead class="unseen"><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


_HEADS = (("class", ""), ("", ' aria-hidden="true"'), ("images", ""), ("share", ""))


_TOP = ' class="top"'


def columns(counts: Sequence[int], names: Sequence[str], most: int = 40) -> str:
    """A histogram as upright bars, every class in its own place, over the classes that are most frequent in words."""
    total, peak = sum(counts), max(max(counts, default=0), 1)
    order = [k for k in sorted(range(len(counts)), key=lambda k: -counts[k]) if counts[k]]
    words = ", ".join(f"<bdi>{text(class_name(names, k))}</bdi> {text(share(counts[k] / total))}" for k in order[:3])
    drawn = "".join(
        f'<rect{_TOP if counts[k] == peak else ""} x="{k + 0.1:.1f}" y="{100 - 100 * counts[k] / peak:.1f}" '
        f'width="0.8" height="{100 * counts[k] / peak:.1f}">'
        f"<title>{text(f'{class_name(names, k)} {share(counts[k] / total)}')}</title></rect>"
        for k in order
    )
    view = f'viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none" aria-hidden="true"'
    shown = f'<svg class="columns" {view}>{drawn}</svg>' if len(counts) <= most else ""
    named = [class_name(names, k) for k in range(len(counts))]
    if max(map(len, named), default=0) <= 2 and len(counts) <= 12:
        shown += (
            f'<div class="ticks" aria-hidden="true">{"".join(f"<span>{text(name)}</span>" for name in named)}</div>'
        )
    return f'{shown}<p class="words">{words or "none"}</p>'


# --- lines -------------------------------------------------------------------------------------------


def chart(found: Chart) -> str:
    """Lines over steps. Drawn by SVG in a unit square that the page stretches, its numbers set in HTML beside it."""
    lines = {name: thinned(points) for name, points in found.series.items()}
    values = [y for line in lines.values() for _, y in line if math.isfinite(y)]
    if not values:
        return ""
    # A first step that is far off must not press all others to the floor.
    low, high = min(values), float(np.quantile(values, 0.99))
    high = high if high > low else low + 1.0
    far = max((x for line in lines.values() for x, _ in line), default=0.0) or 1.0
    ticks = [tick for tick in nice(low, high) if low <= tick <= high]
    levels = [(tick, 100 * (1 - (tick - low) / (high - low))) for tick in ticks]
    paths = "".join(
        f'<path class="line c{k % LINES}" d="{_path(line, far, low, high)}"/>' for k, line in enumerate(lines.values())
    )
    rules = "".join(f'<path class="rule" d="M0 {y:.2f}H100"/>' for _, y in levels)
    left = "".join(f'<span style="top:{y:.2f}%">{short(tick)}</span>' for tick, y in levels)
    below = "".join(
        f'<span style="left:{100 * tick / far:.2f}%">{short(tick)}</span>' for tick in nice(0, far, 6) if tick <= far
    )
    last = {name: next((y for _, y in reversed(line) if math.isfinite(y)), math.nan) for name, line in lines.items()}
    names = "".join(
        f'<li class="c{k % LINES}">{text(name)}<b>{last[name]:.4g}</b></li>' for k, name in enumerate(lines)
    )
    return (
        f'<figure class="chart"><h3>{text(found.title)}</h3><ul class="legend" aria-label="last values">{names}</ul>'
        f'<div class="plot"><div class="left" aria-hidden="true">{left}</div>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'{rules}{paths}</svg><div class="below" aria-hidden="true">{below}</div></div>'
        f"<figcaption>{text(found.note)}</figcaption></figure>"
    )


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """The points, or means of runs of them where there are more than `most`; gaps stay gaps."""
    width = math.ceil(len(points) / most)
    out: list[tuple[float, float]] = []
    run: list[tuple[float, float]] = []
    for x, y in points:
        if math.isfinite(y):
            run.append((x, y))
        if run and (len(run) == width or not math.isfinite(y)):
            out.append((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)))
            run = []
        if not math.isfinite(y):
            out.append((x, math.nan))
    if run:
        out.append((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)))
    return out


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about so many."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.floor(low / step)
    return [round(k * step, 10) for k in range(first, math.ceil(high / step) + 1)]


def short(value: float) -> str:
    """A tick's number: 1500 -> '1.5k', -20.0 -> '−20'."""
    for size, end in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{end}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def _path(line: Sequence[tuple[float, float]], far: float, low: float, high: float) -> str:
    parts, pen = [], "M"
    for x, y in line:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{100 * x / far:.2f} {100 * (1 - (y - low) / (high - low)):.2f}")
        pen = "L"
    return "".join(parts)
