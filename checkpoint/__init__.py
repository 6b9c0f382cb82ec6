"""Saving and loading across layouts."""
