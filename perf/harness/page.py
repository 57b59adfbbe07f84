"""The report: one HTML file that needs no network, and its pictures as PNG beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import scenarios, table
from .problem import not_installed
from .record import Comparison, Record

if TYPE_CHECKING:
    from .pictures import Picture

NEEDS = ("jinja2", "altair", "vl_convert")


@dataclass(frozen=True)
class Section:
    name: str
    check: list[str]
    pictures: list[Picture]
    tables: list[table.Table]


def missing() -> str:
    """What a report needs and isn't here, or ""."""
    return not_installed(*NEEDS, get="pip install 'effk[perf]'")


def html(record: Record, found: Comparison | None, made: Sequence[Picture]) -> str:
    import jinja2
    import vl_convert
    from markupsafe import Markup

    sections = [
        Section(
            family,
            record.checks.get(family, "").splitlines(),
            [p for p in made if p.family == family],
            table.tables(problems),
        )
        for family, problems in table.grouped(record.problems, lambda p: p.family).items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    charts = json.dumps([p.chart.to_dict() for p in made])
    return environment.get_template("page.html").render(
        record=record,
        machine=record.machine,
        facts=table.facts(record),
        found=found,
        changes=table.changes_table(found) if found else None,
        changes_line=table.changes_line(found) if found else "",
        sections=sections,
        overview=[p for p in made if p.name == "roofline"],
        serving=[p for p in made if p.name.startswith("scenario")],
        index={p.name: i for i, p in enumerate(made)},
        served=scenarios.tables(record.scenarios),
        skipped=list(table.not_timed(record)),
        checked=table.CHECKED,
        # A script ends at the first "</script" in it, wherever that stands.
        library=Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")),
        charts=Markup(charts.replace("<", "\\u003c")),
    )


def write(record: Record, folder: Path, found: Comparison | None) -> None:
    """Writes index.html and a PNG of each picture."""
    import vl_convert

    from .pictures import pictures

    folder.mkdir(parents=True, exist_ok=True)
    made = pictures(record)
    (folder / "index.html").write_text(html(record, found, made))
    for picture in made:
        chart = picture.chart.properties(width=760, title=picture.title)
        (folder / f"{picture.name}.png").write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=2))
