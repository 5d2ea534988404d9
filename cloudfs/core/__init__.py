"""Pure values and decisions: no I/O, no clock, no randomness. Imports no other floor."""
