"""The live source: a mount that marks what changes, and syncs that read one point in time of it."""
