"""Kernels that are wrong on purpose, to see that the compile report says so."""
