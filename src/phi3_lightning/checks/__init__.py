"""Proofs on the user's own model, data, settings and device."""
