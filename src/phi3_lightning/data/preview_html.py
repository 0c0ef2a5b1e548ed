"""A preview of the data as one HTML file that needs nothing else."""

import html

from phi3_lightning.batch.segments import Segment
from phi3_lightning.data.preview import Preview


def render_html(preview: Preview, *, show_ids: bool = False) -> str:
    """Write a preview as one HTML file that needs nothing else.

    Args:
        preview: What to show.
        show_ids: Whether to show token ids behind the text.

    Returns:
        The file's content.
    """
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in preview.facts.items()
    )
    most = max(count for _, count in preview.histogram)
    bars = "".join(
        f'<i style="height:{100 * count / most:.1f}%" title="from {start} tokens: {count} documents"></i>'
        for start, count in preview.histogram
    )
    rows = "".join(_section(place, found, show_ids) for place, found in preview.samples)
    first, last = preview.histogram[0][0], preview.histogram[-1][0]
    return _PAGE.format(facts=facts, bars=bars, rows=rows, first=first, last=last)


def _section(place: str, found: list[Segment], show_ids: bool) -> str:
    words = "".join(_span(segment, show_ids) for segment in found)
    return f"<section><h2>{html.escape(place)}</h2><pre>{words}</pre></section>"


def _span(segment: Segment, show_ids: bool) -> str:
    kinds = " ".join(["trained"] * segment.trained + ["special"] * segment.special) or "context"
    ids = f"<small>{' '.join(map(str, segment.ids))}</small>" if show_ids else ""
    return f'<span class="{kinds}">{html.escape(segment.text)}</span>{ids}'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Data preview</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --trained: light-dark(#d3f2d9, #1d4a29); --special: light-dark(#8a1c8a, #e79be7);
  --line: light-dark(#d5d5dd, #44444f); --dim: light-dark(#666, #aaa); --bar: light-dark(#4d7fc4, #7aa5e0); }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: .85rem; font-weight: 500; color: var(--dim); margin: 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.5rem; }}
dt {{ color: var(--dim); }} dd {{ margin: 0; }} figure {{ margin: 1.5rem 0; }}
figcaption {{ display: flex; justify-content: space-between; color: var(--dim); font-size: .85rem; }}
.bars {{ display: flex; align-items: end; gap: 2px; height: 8rem; border-bottom: 1px solid var(--line); }}
.bars i {{ flex: 1; background: var(--bar); min-height: 1px; }}
section {{ border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .8rem 0; }}
pre {{ font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 0; }}
.trained {{ background: var(--trained); border-radius: 3px; }} .special {{ color: var(--special); font-weight: 600; }}
small {{ color: var(--dim); margin: 0 .4em; }}
</style></head><body>
<h1>What the model will see</h1>
<p><span class="trained">Trained</span> text is what the loss is computed on;
<span class="special">special tokens</span> are single tokens; everything else is context.</p>
<dl>{facts}</dl>
<figure><div class="bars">{bars}</div><figcaption><span>{first} tokens</span><span>documents by length</span>
<span>{last} and more</span></figcaption></figure>
{rows}
</body></html>
"""
