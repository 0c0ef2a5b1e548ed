"""The code blocks and links of the README and the guides, and how a reader would use them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cli.conftest import REPOSITORY

PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")])

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n+)?^(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_CHAINS = re.compile(r" (?:&&|\|\||[|;]) ")
_REDIRECTION = re.compile(r" [<>]+ ?\S+")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Relative to the repository."""
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run here, from the comment above it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """Find the fenced blocks of a page."""
    return [
        Block(page, text.count("\n", 0, found.start("fence")) + 1, found["language"], found["text"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def all_blocks(language: str) -> list[Block]:
    """Find the blocks of a language in all pages."""
    pages = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
    return [block for page, text in pages.items() for block in blocks_of(text, page) if block.language == language]


def commands(text: str) -> list[list[str]]:
    """Split the commands of a shell block into words, without comments and redirections."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in _CHAINS.split(_REDIRECTION.sub("", line))]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def without_code(text: str) -> str:
    """Remove fenced blocks and code spans, in which nothing is a link."""
    return re.sub(r"`[^`\n]+`", "`code`", _BLOCK.sub("", text))


def links(text: str) -> list[str]:
    """Find the links of a page, except those to other sites."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)) if not link.startswith("http")]


def anchors(text: str) -> set[str]:
    """Name the headings of a page as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings]
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


def broken(text: str, page: Path) -> list[str]:
    """Name the links of a page that lead nowhere."""
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found
