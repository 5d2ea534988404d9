"""File systems that take snapshots by commands of their own, given in the policy."""
