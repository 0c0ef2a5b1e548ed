"""Base and tuned model side by side on held-out rows: intervals, and the report as JSON, Markdown and one page."""
