"""The frozen Phi-3 and its loss."""
