"""Pure values and decisions: no I/O, no clock, no randomness. Nothing here imports another floor."""
