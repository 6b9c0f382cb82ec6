"""A layout compared with a single process."""
