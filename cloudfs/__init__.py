"""cloudfs: file systems of any size backed up in an object store, browsable as directories."""

__version__ = "0.1.0"
