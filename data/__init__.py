"""Text, tokens and micro-batches."""
