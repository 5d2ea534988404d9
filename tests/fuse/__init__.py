"""Tests of the view, on real mounts."""
