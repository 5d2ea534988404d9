"""Changes of btrfs subvolumes: snapshots, the send stream between two of them, its names."""
