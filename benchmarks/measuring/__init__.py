"""What the commands are made of: options, processes, timing and its rules, results files, the ops, other libraries."""
