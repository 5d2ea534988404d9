"""The read-only view: what a mount shows, and the process that serves it. The only user of FUSE."""
