"""What mkdocs.yml can't say: pages from outside of docs/, and docstrings made ready for mkdocstrings.

Everything in the repository that a page links to is part of the site, under repository/ and its own path: Markdown as a
page, a folder as its README or a list of its files, the rest as it is. Links lead to the same places in the repository
and on the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "docs" / "effk"
DOCS, OUTSIDE = "docs", "repository"
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # in the navigation, linked to or not

LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(#[^()\s]*)?(?=\))")
ITEM = re.compile(r"([-*+]|1\.) ")
FENCE = re.compile(r" *(```+|~~~+)")


def on_startup(**_: Any) -> None:
    """griffe finds packages by the names of their folders, so python_api needs one of the name effk."""
    PACKAGE.parent.mkdir(parents=True, exist_ok=True)
    if not PACKAGE.is_symlink() or PACKAGE.resolve() != ROOT / "python_api":
        PACKAGE.unlink(missing_ok=True)
        PACKAGE.symlink_to(ROOT / "python_api", target_is_directory=True)


# --- Pages from elsewhere ---------------------------------------------------------------------------------------------


def in_repository(uri: str) -> str:
    """The path in the repository of what is at this path of the site's sources."""
    return uri.removeprefix(OUTSIDE + "/") if uri.startswith(OUTSIDE + "/") else f"{DOCS}/{uri}"


def within_site(path: str) -> str | None:
    """The opposite, or None for a path that isn't there."""
    if path.startswith(DOCS + "/"):
        return path.removeprefix(DOCS + "/")
    if not (ROOT / path).exists() or path.startswith(".."):
        return None
    return f"{OUTSIDE}/{path}/README.md" if (ROOT / path).is_dir() else f"{OUTSIDE}/{path}"


def links(text: str, uri: str) -> Iterator[str]:
    """Where relative links of a page lead on the site, as far as there is something."""
    for match in LINK.finditer(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), match[1]))
        if (target := within_site(path)) is not None:
            yield target


def content(uri: str) -> str:
    """Of a Markdown file outside of docs/; a folder without a README gets a list of its files."""
    path = ROOT / in_repository(uri)
    if path.exists():
        return path.read_text()
    files = (file.relative_to(path.parent).as_posix() for file in sorted(path.parent.rglob("*")) if file.is_file())
    return f"# {path.parent.relative_to(ROOT)}\n\n" + "".join(f"- [{file}]({file})\n" for file in files)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    beside = InclusionLevel.NOT_IN_NAV  # it may be, and needn't
    known = {file.src_uri: file.content_string for file in files.documentation_pages()}
    wanted = [f"{OUTSIDE}/{name}" for name in ALWAYS]
    wanted += [target for uri, text in known.items() for target in links(text, uri)]
    while wanted:
        uri = wanted.pop()
        if files.get_file_from_path(uri) or not uri.startswith(OUTSIDE + "/"):
            continue
        if uri.endswith(".md"):
            text = content(uri)
            files.append(File.generated(config, uri, content=text, inclusion=beside))
            wanted += links(text, uri)
        else:
            path = ROOT / in_repository(uri)
            files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=beside))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    uri = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), match[1]))
        target = within_site(path)
        return match[0] if target is None else posixpath.relpath(target, posixpath.dirname(uri)) + (match[2] or "")

    return with_lists(LINK.sub(led, markdown))


def with_lists(markdown: str) -> str:
    """Python-Markdown wants an empty line between a paragraph and a list, others don't."""
    lines: list[str] = []
    fence = ""
    for line in markdown.split("\n"):
        before = lines[-1] if lines else ""
        if fence:
            fence = "" if line.strip() == fence else fence
        elif found := FENCE.match(line):
            fence = found[1]
        elif ITEM.match(line) and before and not before.startswith(" ") and not ITEM.match(before):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


# --- Docstrings -------------------------------------------------------------------------------------------------------

NAMES = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)+):")
SECTION = re.compile(r"[A-Z]\w+:$")


class Docstrings(griffe.Extension):
    """Makes of docstrings what griffe's parser takes them for; adds how an op is called, and links between ops."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        ops = {
            f.name: f
            for family in pkg.modules.values()
            if "ops" in family.members
            for f in family["ops"].functions.values()
            if not f.name.startswith("_") and f.docstring
        }
        for one in documented(pkg):
            assert one.docstring
            text = with_lists(as_parsed(one.docstring.value))
            if ops.get(one.name) is one:
                summary, end, rest = text.partition("\n\n")
                text = f"{summary}\n\n{called(one)}{end}{rest}"
            one.docstring.value = linked(text, {name: op for name, op in ops.items() if op is not one})


def documented(parent: griffe.Object) -> Iterator[griffe.Object]:
    for member in (parent, *parent.members.values()):
        if isinstance(member, griffe.Alias):
            continue
        if member is not parent and member.members:
            yield from documented(member)
        elif member.docstring:
            yield member


def called(op: griffe.Object) -> str:
    """The names by which an op can be called."""
    assert op.parent and op.parent.parent
    family = op.parent.parent
    names = [
        f"`{family.path}.{name}`"
        for name, member in family.members.items()
        if isinstance(member, griffe.Alias) and member.target_path == op.path
    ]
    return f"Called as {' or '.join([*names, f'`torch.ops.effk.{op.name}`'])}."


def linked(text: str, ops: dict[str, griffe.Function]) -> str:
    """Names of ops in code, files of formats, and papers become links."""

    def to_op(match: re.Match[str]) -> str:
        return f"[{match[0]}][{ops[match[1]].path}]" if match[1] in ops else match[0]

    text = re.sub(r"(?<!`)`(\w+)`(?!`)", to_op, text)
    text = re.sub(r"docs/formats/(\w+)\.md", r"[\g<0>][the-packed-format-of-\1]", text)
    return re.sub(r"arXiv:([0-9.]+[0-9])", r"[\g<0>](https://arxiv.org/abs/\1)", text)


def as_parsed(text: str) -> str:
    """Items "a, b: text" become one for each name; a colon in what is returned ends no type."""
    lines: list[str] = []
    section = ""
    names: list[str] = []
    described: list[str] = []

    def end_item() -> None:
        for name in names:
            lines.append(f"    {name}:{described[0]}")
            lines.extend(described[1:])
        names.clear()

    for line in text.split("\n"):
        if names and (not line.startswith("     ") or not line.strip()):
            end_item()
        if SECTION.match(line):
            section = line
        elif section in ("Args:", "Attributes:") and (found := NAMES.match(line)):
            names[:], described = found[1].split(", "), [line[found.end() :]]
            continue
        elif names:
            described.append(line)
            continue
        elif section == "Returns:" and lines[-1] == section:
            line = f"    : {line.strip()}"
        lines.append(line)
    end_item()
    return "\n".join(lines)
