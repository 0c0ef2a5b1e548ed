"""HTML pages and Markdown files, by Jinja templates; all pages share one style, fetch nothing and run no script."""

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
    """Return a template, such as ``preview.html``, with all the values that it uses; HTML and SVG escape all text."""
    return _ENVIRONMENT.get_template(template).render(values)
