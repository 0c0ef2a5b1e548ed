"""Trainable low-rank adapters on a frozen model."""
