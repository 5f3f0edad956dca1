"""What the measuring commands are made of: timing and its rules, the ops, other libraries, processes."""
