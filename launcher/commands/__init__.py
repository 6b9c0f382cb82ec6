"""Sub-commands of `counterflow`, one per module."""
