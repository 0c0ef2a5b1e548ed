"""Training over several devices."""
