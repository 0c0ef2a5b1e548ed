"""From prompts to answers: one decoding loop for batches and for streaming, sampling, incremental detokenisation."""
