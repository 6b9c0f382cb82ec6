"""Command line, processes and failures."""
