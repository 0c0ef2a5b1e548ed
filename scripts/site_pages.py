"""Pages of the site that are made at build time: every option of ``fit``, and each source file that a page links to.

MkDocs calls the functions whose names begin with ``on_`` (https://www.mkdocs.org/dev-guide/plugins/#events). Links to
files outside ``docs/`` are written as GitHub has them, relative to the page; on the site they lead to a page that shows
the file.
"""

import json
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from command_line import help_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
"""A link to a file outside ``docs/``."""

ROLE = re.compile(r":(?:class|meth|func|attr|mod):<code>(?:~(?:[\w.]*\.)?)?")
"""A name in a docstring, with what Sphinx would read before it; ``~`` asks for its last part."""

SOURCES = "sources"
"""The folder of the site that holds those files."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown", ".sbatch": "bash"}

OPTION = re.compile(r"^  (?:-\w \S+, )?--([\w.]+)\b[^\n]*?  +(\S[^\n]*)$", re.MULTILINE)
"""An option in the output of ``--help``, and its text."""

FACTS = re.compile(r" ?\((required, )?type: (.*?)(?:, default: (.*?))?(?:, known subclasses: .*)?\)$")
"""What ``--help`` says behind the text."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of ``docs/`` holds.

    Args:
        files: Those of the site so far.
        config: Of the site.

    Returns:
        The same, with more.
    """
    pages = [file for file in files if file.is_documentation_page()]
    linked = {path.rstrip("/") for page in pages for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(linked):
        if (REPOSITORY / path).exists():  # what does not is reported as a broken link
            files.append(File.generated(config, f"{SOURCES}/{path}.md", content=source_page(path)))
    files.append(File.generated(config, "configuration.md", content=configuration()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to files outside ``docs/`` to their pages.

    Args:
        markdown: The page's text.

    Returns:
        The text, with other links.
    """
    return OUTSIDE.sub(lambda link: f"]({SOURCES}/{link[1].rstrip('/')}.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave the roles of docstrings out, which are for another generator.

    Args:
        html: The page.

    Returns:
        The page.
    """
    return ROLE.sub("<code>", html)


def source_page(path: str) -> str:
    """Show a file of the repository, or what a folder of it holds.

    Args:
        path: Relative to the repository.

    Returns:
        Markdown; the search leaves it out.
    """
    head = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n"
    place = REPOSITORY / path
    if place.is_dir():
        names = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith((".", "__")))
        return head + "".join(f"- `{name}`\n" for name in names)
    text = place.read_text(encoding="utf-8").rstrip("\n")
    if place.suffix == ".ipynb":
        return head + notebook_cells(text)
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{head}{fence}{LANGUAGES.get(place.suffix, 'text')}\n{text}\n{fence}\n"


def notebook_cells(text: str) -> str:
    """Show a notebook as Markdown, without outputs.

    Args:
        text: The content of its file.

    Returns:
        Its cells in order; links are those of the file, and are left out.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", source)
        parts.append(plain if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


@cache
def configuration() -> str:
    """Describe every option of ``fit``, from what its ``--help`` says.

    Returns:
        Markdown, a table for each section of a configuration.
    """
    sections: dict[str, list[str]] = {}
    for name, text in options(help_of("fit")):
        sections.setdefault(name.rpartition(".")[0], []).append(_row(name, text))
    head = (
        "# Every option\n\nWhat `python cli.py fit --help` says, section by section. A configuration is a YAML file "
        "with the same names; each can be given on the command line too, as `--model.lora.r 8`. `validate`, `test` and "
        "`predict` take the same file.\n"
    )
    table = "| option | type | default | |\n|---|---|---|---|\n"
    return head + "".join(f"\n## {name or 'The run'}\n\n{table}{''.join(rows)}" for name, rows in sections.items())


def options(text: str) -> list[tuple[str, str]]:
    """Take the output of ``--help`` apart.

    Args:
        text: The output, each option's text on one line.

    Returns:
        Names and texts of the options that have a type.
    """
    joined = re.sub(r"\n {10,}", "  ", text)  # a long option has its text below it
    return [(name, said) for name, said in OPTION.findall(joined) if FACTS.search(said)]


def _row(name: str, text: str) -> str:
    found = FACTS.search(text)
    assert found is not None
    required, kind, default = found.groups()
    said = _markdown(text[: found.start()])
    cells = f"`{name.rpartition('.')[2]}`", f"`{kind}`", "required" if required else f"`{default}`", said
    return "| " + " | ".join(cells) + " |\n"


def _markdown(text: str) -> str:
    """Write the text of a docstring as Markdown for the cell of a table; code stays as it is."""
    linked = re.sub(r"`([^`<]+) <([^`>]+)>`_+", r"[\1](\2)", text)  # links as Sphinx has them
    pieces = re.split(r"(`+[^`]*`+)", linked)  # each second one is code
    outside = [escape(piece, quote=False).replace("|", "&#124;") for piece in pieces[::2]]
    return "".join(piece for pair in zip(outside, [*pieces[1::2], ""], strict=True) for piece in pair)
