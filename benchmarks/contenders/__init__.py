"""Who is measured by ``training.py``: a runner for each library, and what they all share."""

import os

ENVIRONMENT = dict(os.environ)
"""As the user has set it, for the processes of all: ``import phi3_lightning`` asks torch for huge pages in it."""
