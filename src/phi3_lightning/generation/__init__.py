"""From prompts to answers: one decoding loop for batches and for streaming, sampling, and text as it comes."""
