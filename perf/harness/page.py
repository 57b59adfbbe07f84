"""The HTML page: one file, no scripts, no network. Its pictures are SVG and are also written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from . import table
from .record import Change, ProblemEntry, Record

# Okabe and Ito's colours, which most readers can tell apart; effk's own is the first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f", "#b8a800")

SVG_STYLE = """
svg{font:12px system-ui,sans-serif;fill:#222;max-width:100%;height:auto}
.grid{stroke:#8884;stroke-width:1}.axis{stroke:#888;stroke-width:1;fill:none}.roof{stroke:#888;stroke-width:2;fill:none}
.soft{fill:#777}.end{text-anchor:end}.mid{text-anchor:middle}.one{stroke:#888;stroke-width:1.5;stroke-dasharray:4 3}
@media (prefers-color-scheme:dark){svg{fill:#ddd}.soft{fill:#999}}
"""

PAGE_STYLE = """
:root{color-scheme:light dark;--line:#8883;--good:#0a7d46;--bad:#c6281d}
@media (prefers-color-scheme:dark){:root{--good:#4cc38a;--bad:#ff7a70}}
body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p{margin:.3rem 0}.soft,.dim{opacity:.65}.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
.strong{font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:1rem 0}dt{opacity:.65}dd{margin:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;vertical-align:bottom}th,td{padding:.2rem .7rem .2rem 0;white-space:nowrap}
tr{border-bottom:1px solid var(--line)}td[title]{cursor:help}
"""


class Log:
    """A logarithmic axis from values to pixels."""

    def __init__(self, values: Iterable[float], begin: float, end: float):
        known = list(values)
        self.low, self.high = math.log10(min(known) / 1.25), math.log10(max(known) * 1.25)
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        return self.begin + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2, 5 a decade, or only the decades where there are many."""
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        return [v for d in decades for s in steps if self.low <= math.log10(v := s * 10.0**d) <= self.high]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _dot(x: float, y: float, colour: str, hint: str, hollow: bool = False) -> str:
    paint = f'fill="none" stroke="{colour}" stroke-width="1.8"' if hollow else f'fill="{colour}" fill-opacity="0.85"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if hollow else 5}" {paint}><title>{escape(hint)}</title></circle>'


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{SVG_STYLE}</style>\n{body}\n</svg>\n'


def _legend(x: float, y: float, names: Sequence[str], colours: dict[str, str], hollow: bool) -> list[str]:
    parts = []
    for name in names:
        parts += [_dot(x, y - 4, colours[name], name, hollow and name != "effk"), _text(x + 10, y, name)]
        x += 34 + 7 * len(name)
    return parts


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _label(problem: ProblemEntry, keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {problem.size[key]}" for key in keys if key in problem.size)


def speedup_picture(problems: Sequence[ProblemEntry]) -> str:
    """A row a problem, a dot a peer: how many times as fast effk is. Goals are ticks in the peer's colour."""
    problems = [p for p in problems if any(e.ratio and e.kind != "effk" for e in p.entries)]
    if not problems:
        return ""
    names = table.rivals(problems)
    colours = _colours(["effk", *names])
    keys = table.varying(problems) or list(problems[0].size)
    labels = [_label(p, keys) for p in problems]
    left, top, step, width = 20 + 6.6 * max(map(len, labels)), 58, 20, 940
    ratios = [e.ratio for p in problems for e in p.entries if e.ratio and e.kind != "effk"]
    wanted = [g.wanted for p in problems for g in p.goals]
    x = Log([*ratios, *wanted, 0.8, 1.25], left, width - 20)
    bottom = top + step * len(problems)

    parts = _legend(20, 16, names, colours, hollow=False)
    for tick in x.ticks():
        parts += [_line(x(tick), top - 12, x(tick), bottom, "grid"), _text(x(tick), top - 18, f"{tick:g}x", "soft mid")]
    parts.append(_line(x(1), top - 12, x(1), bottom, "one"))
    for i, (problem, label) in enumerate(zip(problems, labels, strict=True)):
        y = top + step * i + 4
        parts.append(_text(left - 12, y + 4, label, "end"))
        for goal in problem.goals:
            if goal.peer in colours:
                hint = f"goal against {goal.peer}: {goal.wanted:g}x"
                at = x(goal.wanted)
                parts.append(
                    f'<path d="M{at:.1f} {y - 8}v16" stroke="{colours[goal.peer]}" stroke-width="2.5">'
                    f"<title>{escape(hint)}</title></path>"
                )
        for entry in problem.entries:
            if entry.kind != "effk" and entry.ratio:
                hint = f"{label}: {entry.ratio:.2f}x as fast as {entry.name} ({table.duration(entry.time.median)})"
                parts.append(_dot(x(entry.ratio), y, colours[entry.name], hint))
    return _svg(width, bottom + 8, parts)


def roofline_picture(record: Record) -> str:
    """Useful flop/s over useful flops a byte: effk's main back end (full) and the peers (hollow) under the roof.

    Without warm problems, since the roof is memory's.
    """
    problems = [p for p in record.problems if p.flops and p.find(p.main) and p.size.get("caches") != "warm"]
    if not problems:
        return ""
    names = ["effk", *table.unique(e.name for p in problems for e in p.entries if e.kind == "peer")]
    colours = _colours(["effk", *table.rivals(record.problems)])
    used = sorted({p.dtype for p in problems})
    limits = record.limits
    roofs = {name: limits.rate(name) for name in used}
    points = [
        (p, e, p.flops / p.bytes, p.flops / e.time.median)
        for p in problems
        for e in p.entries
        if e.kind == "peer" or e.name == p.main
    ]
    width, height, left, top, base = 940, 470, 80, 40, 425
    knees = [rate / limits.bandwidth for rate in roofs.values()]
    x = Log([*(i for _, _, i, _ in points), *(k * 2 for k in knees)], left, width - 20)
    y = Log([*(r for *_, r in points), *roofs.values()], base, top)

    parts = _legend(left, 16, names, colours, hollow=True)
    for tick in x.ticks():
        parts += [_line(x(tick), top, x(tick), base, "grid"), _text(x(tick), base + 18, f"{tick:g}", "soft mid")]
    for tick in y.ticks():
        name = table.rate(tick, "flop/s")
        parts += [_line(left, y(tick), width - 20, y(tick), "grid"), _text(left - 8, y(tick) + 4, name, "soft end")]
    parts.append(
        _text((left + width) / 2, height - 8, "flops that the result needs, per byte moved at least", "soft mid")
    )
    low = max(10**x.low, 10**y.low / limits.bandwidth)
    high = max(knees)
    parts.append(_line(x(low), y(low * limits.bandwidth), x(high), y(high * limits.bandwidth), "roof"))
    parts.append(_text(x(low) + 60, y(low * limits.bandwidth), f"memory {table.rate(limits.bandwidth, 'B/s')}", "soft"))
    for name, rate in roofs.items():
        parts.append(_line(x(rate / limits.bandwidth), y(rate), width - 20, y(rate), "roof"))
        parts.append(_text(width - 20, y(rate) - 6, f"{name} {table.rate(rate, 'flop/s')}", "soft end"))
    for problem, entry, intensity, rate in sorted(points, key=lambda point: point[1].kind == "effk"):
        own = entry.kind == "effk"
        hint = f"{problem.name}, {entry.name}: {table.rate(rate, 'flop/s')}, {entry.share:.0%} of the limit"
        parts.append(_dot(x(intensity), y(rate), colours["effk" if own else entry.name], hint, hollow=not own))
    return _svg(width, height, parts)


def _html_table(made: table.Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in made.header)
    rows = []
    for row in made.rows:
        cells = []
        for cell in row:
            hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
            cells.append(f'<td class="{cell.tone}"{hint}>{escape(cell.text)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _section(title: str, body: str, text: str = "") -> str:
    return f"<h2>{escape(title)}</h2>\n<p class=soft>{escape(text)}</p>\n{body}\n" if body else ""


def _list(items: Iterable[tuple[str, str]]) -> str:
    made = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items)
    return f"<dl>{made}</dl>" if made else ""


def html(record: Record, found: Sequence[Change] | None) -> str:
    parts = [f"<h1>effk.perf</h1>\n<p class=soft>{escape(record.machine['date'])}</p>\n"]
    if not record.finished:
        parts.append("<p class=bad>Interrupted: this is the part that was measured.</p>\n")
    parts += [f"<p class=bad>{escape(error)}</p>\n" for error in record.errors()]
    parts.append(_list(table.facts(record)))
    if found is not None:
        body = _html_table(table.changes_table(found)) if found else "<p>None.</p>"
        parts.append(
            _section("Changes beyond the spread", body, "Against the base; ranges between the quartiles don't touch.")
        )
    for op, problems in table.by_op(record).items():
        text = "How many times as fast as each peer effk's main back end is. A tick is the goal against that peer."
        parts.append(_section(f"{op}: speed-up", speedup_picture(problems), text))
    text = "Points at the same place from left to right are one problem; peers move more bytes than it needs."
    parts.append(_section("Roofline", roofline_picture(record), text))
    for made in table.tables(record):
        text = "Median time of a call, its share of the machine's limit, and how many times as fast it is as each peer."
        parts.append(_section(made.title, _html_table(made), text))
    parts.append(_section("Peers", _list(record.notes.items())))
    skipped = [(name, f"{why} ({count} problem{'s' * (count > 1)})") for name, why, count in table.not_timed(record)]
    parts.append(_section("Not timed", _list(skipped)))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>effk.perf</title>'
    body = "".join(parts)
    return f"<!doctype html><html lang=en><head>{head}<style>{PAGE_STYLE}</style></head><body>\n{body}</body></html>\n"


def write(record: Record, folder: Path, found: Sequence[Change] | None) -> None:
    """Writes index.html, roofline.svg and a picture of speed-ups for each op."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"roofline": roofline_picture(record)}
    pictures |= {f"speedup_{op}": speedup_picture(problems) for op, problems in table.by_op(record).items()}
    for name, picture in pictures.items():
        if picture:
            (folder / f"{name}.svg").write_text(picture)
    (folder / "index.html").write_text(html(record, found))
