"""AdamW with its state sharded over replicas."""
