"""cloudfs: backups of file systems of any size in an object store, browsable as ordinary directories."""

__version__ = "0.1.0"
