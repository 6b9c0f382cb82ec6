"""Configuration: sections, checks, shipped files."""
