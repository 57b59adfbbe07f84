"""Tables of Markdown files are what their records say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from effk.perf.harness import figures
from effk.perf.harness.record import Record

ROOT = Path(__file__).parents[1]
RECORD = "xeon-avx512-2-cores/vq.json"
BLOCK = f"before\n<!-- figures: {RECORD} vq_topk codes=16x4 : torch-topk -->\n<!-- end of figures -->\nafter\n"


def pages() -> list[str]:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True).stdout.split()
    return [name for name in listed if figures.BLOCK.search((ROOT / name).read_text())]


@pytest.mark.parametrize("name", pages() or ["README.md"])
def test_tables_are_those_of_the_records(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m effk.perf.harness.figures FILE` writes them."""
    monkeypatch.chdir(ROOT)
    assert figures.main(["--check", name]) == 0


def test_every_family_has_a_table_in_the_readme() -> None:
    chosen = figures.BLOCK.findall((ROOT / "README.md").read_text())
    families = {p.name for p in (ROOT / "python_api").iterdir() if (p / "ops.py").exists()}
    assert {selection.split()[1].split("_")[0].replace("gp", "ba") for _, selection, _ in chosen} == families


def test_records_are_readable_and_whole() -> None:
    """One that has errors says so in its folder's README."""
    for path in (ROOT / "perf" / "results").glob("*/*.json"):
        record = Record.read(path)
        assert (record.problems or record.scenarios) and record.finished, path
        assert not record.errors() or path.name in (path.parent / "README.md").read_text()


def test_a_changed_record_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads((ROOT / "perf" / "results" / RECORD).read_text())
    file = tmp_path / "perf" / "results" / RECORD
    file.parent.mkdir(parents=True)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    file.write_text(json.dumps(record))
    page.write_text(BLOCK)
    assert figures.main(["--check", str(page)]) == 1 and page.read_text() == BLOCK
    assert figures.main([str(page)]) == 0 and figures.main(["--check", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- figures") and text.endswith("<!-- end of figures -->\nafter\n")
    assert f"](../perf/results/{RECORD})" in text and "python -m effk.perf vq" in text

    topk = next(p for p in record["problems"] if p["op"] == "vq_topk" and p["size"]["codes"] == "16x4")
    own = next(e for e in topk["entries"] if e["name"] == topk["main"])
    own["time"]["median"] = 12e-3
    file.write_text(json.dumps(record))
    assert figures.main(["--check", str(page)]) == 1
    assert figures.main([str(page)]) == 0 and "| 12 ms |" in page.read_text()


def test_prose_between_tables_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a comment at a table's end is missing."""
    monkeypatch.chdir(ROOT)
    start = f"<!-- figures: {RECORD} vq_topk codes=16x4 -->\n"
    made = figures.generated(f"{start}prose\n{start}<!-- end of figures -->\n", ROOT, ROOT)
    assert made.startswith(f"{start}prose\n{start}**vq_topk**")


@pytest.mark.parametrize(
    "selection, reason",
    [
        (f"{RECORD} vq_topk codes=none", "no such problem"),
        (f"{RECORD} vq_topk : none-such", "no time of none-such"),
        ("none.json vq_topk", "none.json"),
    ],
)
def test_what_selects_nothing_is_refused(
    selection: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- figures: {selection} -->\n<!-- end of figures -->")
    with pytest.raises(SystemExit) as raised:
        figures.main([str(page)])
    assert raised.value.code == 2 and reason in capsys.readouterr().err
