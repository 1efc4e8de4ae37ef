"""Bounds of the kernels, counted from their PTX by emulation, for a GPU that need not be there."""
