"""A preview of the data as one HTML file that needs nothing else."""

from phi3_lightning.data.preview import Preview
from phi3_lightning.pages import render


def render_html(preview: Preview, *, show_ids: bool = False) -> str:
    """Return a preview as one HTML file, with the token ids behind the text where ``show_ids`` is true."""
    return render("preview.html", preview=preview, show_ids=show_ids)
