"""One module for each family of benchmarks: the functions that are registered."""
