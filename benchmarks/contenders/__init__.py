"""Who is measured by ``training.py``: a runner for each library, and what they all share."""
