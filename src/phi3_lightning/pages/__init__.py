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
    """Render a template of this package; in HTML and SVG all text is escaped.

    Args:
        template: The file name, such as ``preview.html``.
        values: A value for every name that the template uses.
    """
    return _ENVIRONMENT.get_template(template).render(values)
