"""Line numbers of the code that the pages quote. `python tests/refresh_map.py`, or `make map`, puts them right.

A quotation is a link to a line and the code that stands there: [`sppo.py:30`](../sppo.py#L30) `win_rates`.
A name stands for the line that defines it; anything else stands for the one line that contains it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# All but samples.md, whose indented lines are a model's, and no commands.
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "samples.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
QUOTATION = re.compile(r"\[`([\w/]+\.py):(\d+)`\]\(((?:\.\./)*)([\w/]+\.py)#L(\d+)\) `([^`]+)`")


def line_of(file: str, code: str) -> int:
    """The line of a file that `code` stands for. ValueError if there is none, or more than one."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    definition = re.compile(rf"\s*(def|class) {re.escape(code)}\b")

    found = [number for number, line in enumerate(lines, 1) if definition.match(line)]
    if not found:
        found = [number for number, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        places = ", ".join(map(str, found)) or "none"
        raise ValueError(f"`{code}` should stand for one line of {file}, found {places}")
    return found[0]


def refresh(text: str) -> tuple[str, list[str]]:
    """A page with its line numbers put right, and what is wrong with quotations that cannot be."""
    problems = []

    def put_right(match):
        file, _, up, target, _, code = match.groups()
        try:
            line = line_of(file, code)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return match[0]
        return f"[`{file}:{line}`]({up}{target}#L{line}) `{code}`"

    return QUOTATION.sub(put_right, text), problems


def main() -> int:
    wrong = False
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new, problems = refresh(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
        for problem in problems:
            print(f"{page.relative_to(ROOT)}: {problem}", file=sys.stderr)
        wrong = wrong or bool(problems)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
