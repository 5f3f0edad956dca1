"""What the kernel workshop is made of."""
