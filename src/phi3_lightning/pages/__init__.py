"""HTML pages and Markdown files, by Jinja templates; all pages share one style, and load and run nothing."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

__all__ = ["render"]

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(("html", "svg")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: object) -> str:
    """Return a template of this package with values; in HTML and SVG all text is escaped.

    Args:
        template: Its file name, such as ``preview.html``.
        values: Values by the names that the template uses, every one of which is required.
    """
    return _ENVIRONMENT.get_template(template).render(values)
