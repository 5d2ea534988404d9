"""The watch source: a daemon that hears what changes, and syncs that visit only that."""
