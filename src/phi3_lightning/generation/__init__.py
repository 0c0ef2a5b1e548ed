"""Answers, batch by batch or token by token."""
