"""Chat files in, batches out."""
