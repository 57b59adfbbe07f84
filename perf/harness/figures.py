"""`python -m effk.perf.harness.figures FILE...`: writes the tables of Markdown files from the records in perf/results.

A table stands between two comments, of which the first says what it shows:

    <!-- figures: DEVICE/FILE.json OP KEY=VALUE[,VALUE] ... : PEER ... -->
    <!-- end of figures -->

These are the problems of that op whose sizes have these values, effk's main back end beside these peers. Exit status:
0; 1 where --check is given and a file isn't what its records say; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import table
from .record import RESULTS, ProblemEntry, Record

BLOCK = re.compile(r"(<!-- figures: ([^\n]+) -->\n)(?:(?!<!-- figures).)*?(<!-- end of figures -->)", re.DOTALL)


def matches(problem: ProblemEntry, op: str, sizes: dict[str, list[str]]) -> bool:
    return problem.op == op and all(str(problem.size.get(key)) in values for key, values in sizes.items())


def figures(selection: str, root: Path, folder: Path) -> str:
    """The table that a comment asks for, in a file of `folder`. Raises ValueError where it selects nothing."""
    chosen, _, peers = (shlex.split(part) for part in selection.partition(" : "))
    file, op, *pairs = chosen
    sizes = {key: values.split(",") for key, _, values in (pair.partition("=") for pair in pairs)}
    path = root / RESULTS / file
    record = Record.read(path)
    problems = [p for p in record.problems if matches(p, op, sizes)]
    if not problems:
        raise ValueError(f"{selection}: {file} has no such problem")
    if unknown := set(peers) - set(table.rivals(problems)):
        raise ValueError(f"{selection}: no time of {', '.join(sorted(unknown))}")
    made = table.table_of(problems, peers, main_only=True)
    lines = [made.header, ["-"] * len(made.header), *([cell.text for cell in row] for row in made.rows)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine, link = record.machine, os.path.relpath(path, folder)
    where = (
        f"{machine['device']}, {machine['threads']} threads" if machine["device_type"] == "cpu" else machine["device"]
    )
    # An op made of others has no back end of its own.
    where += "".join(f", {name}" for name in table.unique(p.main for p in problems) if name != "reference")
    title = table.title(problems).replace(op, f"**{op}**", 1).replace("  ", ", ")
    said = f"{title}. {where}, torch {machine['torch']}, {machine['date'][:10]}{table.busy(record)}"
    return f"{said}: `{record.said}`, [record]({link}).\n\n{rows}\n"


def generated(text: str, root: Path, folder: Path) -> str:
    """A Markdown file of `folder` with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}{figures(match[2], root, folder)}{match[3]}"

    return BLOCK.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effk.perf.harness.figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="+", type=Path, help="a Markdown file")
    parser.add_argument("--check", action="store_true", help="writes nothing, tells what would change")
    args = parser.parse_args(argv)
    root, differing = Path.cwd(), []
    for file in args.file:
        try:
            before = file.read_text()
            after = generated(before, root, file.resolve().parent)
        except (OSError, ValueError) as error:
            parser.error(f"{file}: {error}")
        if after != before:
            differing.append(file)
            if not args.check:
                file.write_text(after)
    for file in differing:
        print(f"{file}: {'differs from its records' if args.check else 'written'}")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
