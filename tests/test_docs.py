"""The documentation: the site builds without a warning, links lead somewhere, and examples print what the pages say.

An example is a block of ```python that is followed by nothing but a block of ```text, its output.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import effk
import pytest
from effk import _library, _registry

from .kit.needs import need

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FAMILIES = sorted({op.family for op in _registry.OPS.values()})
EXAMPLE = re.compile(r"^```python\n((?:(?!```).*\n)*)```\n\n?```text\n((?:(?!```).*\n)*)```$", re.M)
BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(r"(?<![\w/.])(?:csrc|docs|examples|kernels|perf|python_api|tests)/[\w./-]+\w")


def markdown() -> list[str]:
    """All of the repository, by their paths."""
    listed = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md")
    return sorted(set(subprocess.run(listed, capture_output=True, text=True).stdout.split()))


# --- The site ---------------------------------------------------------------------------------------------------------


class Built(HTMLParser):
    """A page: its ids, text and tags by the headings that have one, and the addresses that it loads."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.sections: dict[str, str] = {}
        self.loaded: list[str] = []
        self.tags: dict[str, set[str]] = {}
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if found := given.get("id"):
            self.ids.add(found)
            if re.fullmatch(r"h[1-6]", tag):
                self._section = found
        self.tags.setdefault(self._section, set()).add(tag)
        address = given.get("href" if tag == "link" else "src") if tag in ("link", "script", "img", "iframe") else None
        if address:
            self.loaded.append(address)

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkdocs", "material", "mkdocstrings_handlers")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **nowhere}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


built = pytest.mark.xdist_group("site")  # once for all of them


@built
def test_site_has_all_pages(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    pages |= {Path("repository/CONTRIBUTING.html"), Path("repository/CHANGELOG.html"), Path("repository/index.html")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    assert "lscd_linear" in (site / "search" / "search_index.json").read_text()


@built
def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = Built(path.read_text()).loaded
        assert loaded and not [address for address in loaded if "//" in address], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", path.read_text()), path


@built
@pytest.mark.parametrize("op", _registry.OPS.values(), ids=lambda op: op.name)
def test_op_is_on_its_familys_page(site: Path, op: _registry.Op) -> None:
    """With all its parameters, what it returns and raises, and each as a list."""
    page = Built((site / "api" / f"{op.family}.html").read_text())
    anchor = f"{op.api.__module__}.{op.name}"
    assert anchor in page.ids
    text = page.sections[anchor]
    order = [text.index(heading) for heading in (f"torch.ops.effk.{op.name}", "Parameters:", "Returns:", "Raises:")]
    assert order == sorted(order) and {"li", "pre", "code"} <= page.tags[anchor]
    words = text[text.index("Parameters:") : text.index("Returns:")].split()
    for name in inspect.signature(op.api).parameters:
        assert name in words
    assert not re.search(r"Args:|\*\*|`|\]\[|^ *- ", text, re.M)


def public(module: str) -> Iterator[tuple[str, set[str]]]:
    """Names that a module offers, and the anchors under which each may be found."""
    offering = importlib.import_module(module)
    for name in offering.__all__:
        thing = getattr(offering, name)
        own = f"{getattr(thing, '__module__', module)}.{getattr(thing, '__qualname__', name)}"
        yield name, {f"{module}.{name}", own}


@built
@pytest.mark.parametrize("family", ["", *FAMILIES])
def test_public_names_are_on_its_page(site: Path, family: str) -> None:
    ids = Built((site / "api" / f"{family or 'effk'}.html").read_text()).ids
    for name, anchors in public(f"effk.{family}".rstrip(".")):
        assert name in FAMILIES or anchors & ids, name


# --- The pages --------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [name for name in markdown() if not name.startswith("docs/")] or ["README.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Those of pages outside of docs/; mkdocs sees to the others."""
    text = BLOCK.sub("", (ROOT / name).read_text())
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if fragment:
            assert fragment in {slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}, target


@pytest.mark.parametrize("name", markdown() or ["README.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    named = {found for found in PATH.findall(text) if not re.search(rf"{re.escape(found)}[<_*{{]", text)}
    assert not [found for found in named if not (ROOT / found).exists()]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_page_says_all(family: str) -> None:
    """What it is, when it pays and when it doesn't, the paper, the format, an example, figures, limits."""
    text = (DOCS / f"{family}.md").read_text()
    assert text.startswith(f"# {family}: ")
    for heading in ("When it pays", "Quick start", "Example", "Figures", "Limits"):
        assert f"\n## {heading}\n" in text, heading
    assert "**Not for" in text.partition("\n## When it pays\n")[2].partition("\n## ")[0]
    opening = text.partition("\n## ")[0]
    assert "https://arxiv.org/abs/" in opening and f"[API](api/{family}.md) · [format](" in opening
    assert "\n```text\n" in text.partition("\n## Example\n")[2].partition("\n## ")[0]
    assert re.search(r"\]\(\.\./perf/results/\S+\.json\)", text)


def examples() -> list[str]:
    return [name for name in markdown() if EXAMPLE.search((ROOT / name).read_text())]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_all_guides_have_an_example() -> None:
    assert {"docs/index.md", *(f"docs/{family}.md" for family in FAMILIES)} <= set(examples())


@pytest.mark.parametrize("level", _library.supported_cpu_levels()[1:] or ["scalar"])  # which takes long
@pytest.mark.parametrize("name", examples() or ["README.md"])
def test_examples_print_what_pages_say(name: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code, expected in EXAMPLE.findall((ROOT / name).read_text()):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), effk.cpu_level(level):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        assert lines(out.getvalue()) == lines(expected)


def test_options_of_the_benchmark_are_there() -> None:
    """Those that its page names."""
    done = subprocess.run([sys.executable, "-m", "effk.perf", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = "\n".join(line for line in (DOCS / "perf.md").read_text().splitlines() if "pip install" not in line)
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
    assert "--quick" in named and not named - set(re.findall(r"--[a-z-]+", done.stdout))
