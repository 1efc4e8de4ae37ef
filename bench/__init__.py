"""How fast, how small, how accurate: the demo and the benchmarks."""
