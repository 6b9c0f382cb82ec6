"""FP8 training compared with BF16."""
