"""Expert placement by load."""
