"""The code blocks of README and site, and the commands of a shell block.

A test runs each block, with a tiny model in place of the page's. ``<!-- check: parse -->``, which readers do not see,
comes before a block that needs a GPU, hours, or a model from elsewhere. A test parses its commands and checks their
settings.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "data" / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "study"),
]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- check: (\w+) -->\n *\Z")
_HEREDOC = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$\n?", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"'[^']*'|\$\{?(\w+)\}?")
_ASSIGNED = re.compile(r"^(\w+)=(.*)$", re.DOTALL)


class Block(NamedTuple):
    """A block of code: its page and line, its language, its text, and whether it is only parsed."""

    page: Path
    line: int
    language: str
    text: str
    parsed: bool

    @property
    def name(self) -> str:
        """Where it is."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in their order."""
    whole, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(whole):
        mark = _MARK.search(whole[: match.start()])
        assert mark is None or mark[1] == "parse", f"{page}: no such check: {mark[1]}"
        line = whole.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], textwrap.dedent(match["text"]), mark is not None))
    return found


def files_of(text: str) -> dict[str, str]:
    """The files that a shell block writes with ``cat > FILE <<'END'``."""
    return {match[1]: match[3] for match in _HEREDOC.finditer(text)}


def commands_of(text: str, variables: Mapping[str, str]) -> Iterator[list[str]]:
    """The words of each command of a shell block, with variables in place; those that the block sets are its own."""
    known = dict(variables)
    for line in _HEREDOC.sub("", text).replace("\\\n", " ").splitlines():
        # Comments go first: an apostrophe in one would open a quote.
        bare = re.sub(r"(^|\s)#.*$", "", line)
        filled = _VARIABLE.sub(lambda match: known[match[1]] if match[1] else match[0], bare)
        words: list[str] = []
        for word in [*_split(filled), "|"]:
            if word in ("|", "&&", ";"):
                if words:
                    yield words
                words = []
            elif not words and (assigned := _ASSIGNED.match(word)):
                known[assigned[1]] = assigned[2]
            else:
                words.append(word)


def _split(line: str) -> list[str]:
    return shlex.split(line)
