"""Kernels as compiled code without a GPU; see README.md beside this file."""
