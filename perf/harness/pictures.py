"""The page's pictures, as Vega-Lite charts: in a browser they answer to the pointer; PNGs are made without one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt

from . import table
from .record import ProblemEntry, Record

# Okabe and Ito's colours, which most readers can tell apart, and more where these don't suffice; the first is effk's.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c6d31",
    "#7f7f7f",
    "#b8a800",
    "#5e3c99",
    "#a6761d",
    "#1b7837",
    "#e7298a",
)
FAINT = "#767676"
CURVE = 3  # points that make one
DECADE = 10.0  # between a curve's ends, from where its axis is logarithmic
COLUMNS = 3  # of a legend, as wide as a telephone
HEAD, ROW = 110, 20  # pixels of what is above the rows of a picture, and of a row


@dataclass(frozen=True)
class Picture:
    name: str  # of the file
    title: str
    text: str
    family: str  # "": of all
    chart: Any  # altair's types of layers differ from those of charts


def pictures(record: Record) -> list[Picture]:
    found: list[Picture] = []
    for family, problems in table.grouped(record.problems, lambda p: p.family).items():
        names = ["effk", *table.rivals(problems)]  # each has the same colour in all pictures of the family
        for op, of_op in table.grouped(problems, lambda p: p.op).items():
            found += _speedup(family, op, of_op, names)
        for number, group in enumerate(table.grouped(problems, table.alike).values()):
            found += _curves(family, number, group, names)
    found += [*_roofline(record), *_rates(record), *_latencies(record)]
    return [replace(p, chart=p.chart.properties(description=p.title)) for p in found]


def _colour(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Any:
    """Of these names; the legend shows those that occur."""
    scale = alt.Scale(domain=list(names), range=[COLOURS[i % len(COLOURS)] for i in range(len(names))])
    there = {row["name"] for row in rows}
    shown = [name for name in names if name in there]
    return alt.Color("name:N", scale=scale, legend=alt.Legend(title=None, orient="top", columns=COLUMNS, values=shown))


def _data(rows: list[dict[str, Any]]) -> Any:
    return alt.Data(values=rows)


def _said(problem: ProblemEntry, keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {problem.size[key]}" for key in keys if key in problem.size)


def _tooltip(*fields: str) -> list[Any]:
    return [alt.Tooltip(f"{field}:N") for field in fields]


def _wide(chart: Any, height: int) -> Any:
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    return chart.properties(width="container", height=height, autosize=fit).configure_view(stroke=None)


def _speedup(family: str, op: str, problems: Sequence[ProblemEntry], names: Sequence[str]) -> Iterator[Picture]:
    """A row a problem, a dot a peer, ticks for goals. Of one problem, its table says as much."""
    if len(problems) == 1:
        return
    keys = table.varying(problems) or list(problems[0].size)
    # What tells most apart comes first: a narrow screen cuts labels short.
    keys = sorted(keys, key=lambda key: -len({p.size.get(key) for p in problems}))
    rows = [
        {
            "problem": _said(p, keys),
            "name": e.name,
            "ratio": e.ratio,
            "effk": f"{e.ratio:.2f} times as fast",
            "time": table.duration(e.time.median),
        }
        for p in problems
        for e in p.entries
        if e.kind != "effk" and e.ratio
    ]
    if not rows:
        return
    goals = [
        {"problem": _said(p, keys), "name": g.peer, "ratio": g.wanted, "goal": f"{g.wanted:g} times as fast"}
        for p in problems
        for g in p.goals
        if g.peer in table.rivals(problems)
    ]
    x = alt.X(
        "ratio:Q",
        scale=alt.Scale(type="log", nice=False),
        title="times as fast",
        axis=alt.Axis(format="~g", orient="top"),
    )
    y = alt.Y("problem:N", sort=None, title=None, axis=alt.Axis(labelLimit=420, grid=True))
    colour = _colour(names, rows)
    one = alt.Chart(_data([{"ratio": 1}])).mark_rule(strokeDash=[4, 3], color=FAINT).encode(x=x)
    dots = alt.Chart(_data(rows)).mark_circle(size=70, opacity=0.9)
    layers = [one, dots.encode(x=x, y=y, color=colour, tooltip=_tooltip("problem", "name", "time", "effk"))]
    if goals:
        ticks = alt.Chart(_data(goals)).mark_tick(thickness=2.5, size=15)
        layers.append(ticks.encode(x=x, y=y, color=colour, tooltip=_tooltip("problem", "name", "goal")))
    yield Picture(
        f"speedup_{op}",
        f"{op}: speed-up",
        "How many times as fast as each peer effk's main back end is; right of the line, it is faster. "
        "A tick is the goal against that peer.",
        family,
        _wide(alt.layer(*layers), HEAD + ROW * len({row["problem"] for row in rows})),
    )


def _curves(family: str, number: int, problems: Sequence[ProblemEntry], names: Sequence[str]) -> Iterator[Picture]:
    """Cost against each size in which enough of them differ; one chosen set of the others is shown at a time.

    Sizes that go together, as observations with cameras, make one curve, against the largest.
    """
    sizes = table.varying(problems)
    for key in sizes:
        bound = [k for k in sizes if k != key and _follows(problems, k, key)]
        if any(_follows(problems, key, k) and _greatest(problems, k) > _greatest(problems, key) for k in bound):
            continue
        others = [k for k in sizes if k != key and k not in bound]
        with_key = [p for p in problems if key in p.size]
        groups = table.grouped(with_key, functools.partial(_said, keys=others))
        curves = {said: group for said, group in groups.items() if len({p.size[key] for p in group}) >= CURVE}
        if curves:
            yield _curve(family, f"cost_{problems[0].op}_{number}_{key}", key, curves, names)


def _follows(problems: Sequence[ProblemEntry], key: str, of: str) -> bool:
    """Whether a size is known when another is."""
    return len({(p.size.get(of), p.size.get(key)) for p in problems}) == len({p.size.get(of) for p in problems})


def _greatest(problems: Sequence[ProblemEntry], key: str) -> float:
    return max(p.size.get(key, 0) for p in problems)


def _curve(family: str, name: str, key: str, curves: dict[str, list[ProblemEntry]], names: Sequence[str]) -> Picture:
    problems = [p for group in curves.values() for p in group]
    rows = [
        {
            "at": at,
            key: p.size[key],
            "name": "effk" if e.name == p.main else e.name,
            "seconds": e.time.median,
            "time": table.duration(e.time.median),
            "low": e.time.q1,
            "high": e.time.q3,
            "limit": f"{e.share:.0%} of the {p.limit} limit",
        }
        for at, group in curves.items()
        for p in group
        for e in p.entries
        if e.kind != "effk" or e.name == p.main
    ]
    floors = [
        {"at": at, key: p.size[key], "name": "limit", "seconds": p.roofline, "time": table.duration(p.roofline)}
        for at, group in curves.items()
        for p in group
        if p.roofline
    ]
    numbers = [p.size[key] for p in problems]
    logarithmic = min(numbers) > 0 and max(numbers) >= DECADE * min(numbers)
    ticks = alt.Axis(values=sorted(set(numbers)), format="~s" if max(numbers) >= 1e4 else "~g", labelOverlap=True)
    x = alt.X(
        f"{key}:Q",
        scale=alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(nice=False, zero=False),
        axis=ticks,
    )
    seconds = alt.Axis(labelExpr="format(datum.value, '~s') + 's'", title="time of a call")
    y = alt.Y("seconds:Q", scale=alt.Scale(type="log", nice=False), axis=seconds)
    colour = _colour(names, rows)
    lines = alt.Chart(_data(rows)).encode(x=x, color=colour)
    layers = [
        lines.mark_line(point=alt.OverlayMarkDef(size=45)).encode(y=y, tooltip=_tooltip(key, "name", "time", "limit")),
        lines.mark_rule().encode(y=alt.Y("low:Q", scale=alt.Scale(type="log")), y2="high:Q"),
    ]
    if floors:
        floor = alt.Chart(_data(floors)).mark_line(strokeDash=[4, 3], color=FAINT)
        layers.insert(0, floor.encode(x=x, y=y, tooltip=_tooltip(key, "name", "time")))
    chart = alt.layer(*layers)
    if len(curves) > 1:
        at = alt.param(name="at", value=next(iter(curves)), bind=alt.binding_select(options=list(curves), name="at "))
        chart = alt.layer(*(layer.transform_filter("datum.at === at") for layer in layers)).add_params(at)
    fixed = table.title(problems)
    return Picture(
        name,
        f"{problems[0].op}: cost against {key}",
        f"{fixed}. Medians of a call, bars from quartile to quartile; dashed: what the machine's limits allow.",
        family,
        _wide(chart, 320),
    )


def _served(record: Record, scenario: str, *numbers: str) -> list[dict[str, Any]]:
    """Of the entries that have these numbers."""
    return [
        {"service": e.service, "name": "effk" if e.kind == "effk" else e.candidate, "scenario": scenario, **e.numbers}
        for e in record.scenarios
        if e.scenario == scenario and all(e.numbers.get(number) for number in numbers)
    ]


def _services(rows: Sequence[dict[str, Any]]) -> tuple[Any, Any, int]:
    """A row each, the colour of candidates, and the picture's height."""
    y = alt.Y("service:N", sort=None, title=None, axis=alt.Axis(labelLimit=420, grid=True))
    names = table.unique(["effk", *(row["name"] for row in rows)])
    return y, _colour(names, rows), HEAD + 2 * ROW * len({row["service"] for row in rows})


def _rates(record: Record) -> Iterator[Picture]:
    rows = [*_served(record, "offline", "rate"), *_served(record, "server", "rate")]
    if not rows:
        return
    y, colour, height = _services(rows)
    x = alt.X("rate:Q", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~s", title="queries a second"))
    kinds = alt.Scale(domain=["offline", "server"], range=["circle", "square"])
    shape = alt.Shape("scenario:N", scale=kinds, legend=alt.Legend(orient="top", title=None))
    tooltip = _tooltip("service", "name", "scenario", "rate")
    points = alt.Chart(_data(rows)).mark_point(filled=True, size=80, opacity=0.9)
    yield Picture(
        "scenario_rates",
        "Queries a second",
        "offline: the largest batch, over and over. server: the largest rate of Poisson arrivals of which 99% are "
        "answered within the bound."
        + "".join(f" None for {e.candidate}, {e.service}." for e in record.scenarios if e.numbers.get("rate") == 0),
        "",
        _wide(points.encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip), height),
    )


def _latencies(record: Record) -> Iterator[Picture]:
    rows = _served(record, "single-stream", "p50", "p99")
    if not rows:
        return
    y, colour, height = _services(rows)
    axis = alt.Axis(labelExpr="format(datum.value, '~s') + 's'", title="latency of a query")
    x = alt.X("p50:Q", scale=alt.Scale(type="log", nice=False), axis=axis)
    chart = alt.Chart(_data(rows)).encode(y=y, yOffset="name:N", color=colour)
    tooltip = _tooltip("service", "name", "p50", "p90", "p99")
    yield Picture(
        "scenario_latencies",
        "Latency of a single stream",
        "Queries one after the other: from the median (dot) to the 99th percentile; seconds.",
        "",
        _wide(
            alt.layer(
                chart.mark_rule(strokeWidth=2).encode(x=x, x2="p99:Q", tooltip=tooltip),
                chart.mark_circle(size=70, opacity=0.9).encode(x=x, tooltip=tooltip),
            ),
            height,
        ),
    )


def _roofline(record: Record) -> Iterator[Picture]:
    """Without warm problems, since the roof is memory's."""
    problems = [p for p in record.problems if p.flops and p.find(p.main) and p.size.get("caches") != "warm"]
    if not problems:
        return
    limits = record.limits
    rows: list[dict[str, Any]] = [
        {
            "problem": p.name,
            "name": "effk" if e.name == p.main else "peers",
            "candidate": e.name,
            "intensity": p.flops / p.bytes,
            "rate": p.flops / e.time.median,
            "reaches": f"{table.rate(p.flops / e.time.median, 'flop/s')}, {e.share:.0%} of the limit",
            "family": p.family,
        }
        for p in problems
        for e in p.entries
        if e.kind == "peer" or e.name == p.main
    ]
    highest = max(limits.matmul.values())
    low = min(row["intensity"] for row in rows) / 2
    high = 2 * max([*(row["intensity"] for row in rows), highest / limits.bandwidth])
    flat = [
        {"roof": f"{name} {table.rate(rate, 'op/s')}", "intensity": at, "rate": rate}
        for name, rate in limits.matmul.items()
        for at in (rate / limits.bandwidth, high)
    ]
    slanted = [
        {"roof": f"{name} {table.rate(bandwidth, 'B/s')}", "intensity": rate / bandwidth, "rate": rate}
        for name, bandwidth in (("read", limits.read), ("copy", limits.copy))
        for rate in (low * bandwidth, highest)
    ]
    x = alt.X(
        "intensity:Q",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~g", title="flops that the result needs, per byte moved at least"),
    )
    y = alt.Y(
        "rate:Q",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(labelExpr="format(datum.value, '~s') + 'flop/s'", title=None),
    )
    families = table.unique(row["family"] for row in rows)
    colour = alt.Color(
        "family:N",
        scale=alt.Scale(domain=families, range=list(COLOURS[: len(families)])),
        legend=alt.Legend(orient="top", title=None, columns=COLUMNS),
    )
    kinds = alt.Scale(domain=["effk", "peers"], range=["circle", "cross"])
    shape = alt.Shape("name:N", scale=kinds, legend=alt.Legend(orient="top", title=None))
    filled = alt.condition("datum.name == 'effk'", alt.value(0.9), alt.value(0.45))
    points = alt.Chart(_data(rows)).mark_point(filled=True, size=55)
    ceiling = alt.Chart(_data(flat + slanted)).mark_line(color=FAINT, strokeWidth=2)
    labels = alt.Chart(_data(flat[1::2])).mark_text(align="right", dy=-7, color=FAINT)
    feet = [  # above the higher line, below the lower
        alt.Chart(_data([foot])).mark_text(align="left", dx=25, dy=dy, color=FAINT)
        for foot, dy in zip(sorted(slanted[::2], key=lambda foot: -float(foot["rate"])), (-22, 8), strict=True)
    ]
    chart = alt.layer(
        ceiling.encode(x=x, y=y, detail="roof:N"),
        labels.encode(x=x, y=y, text="roof:N"),
        *(foot.encode(x=x, y=y, text="roof:N") for foot in feet),
        points.encode(
            x=x, y=y, color=colour, shape=shape, opacity=filled, tooltip=_tooltip("problem", "candidate", "reaches")
        ),
    )
    yield Picture(
        "roofline",
        "Roofline",
        "Under the limits measured in the same run: memory read and copied, and each type's rate of "
        "multiplying. Points above one another are one problem; peers move more bytes than it needs.",
        "",
        _wide(chart, 440),
    )
