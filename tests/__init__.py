"""The tests of cloudfs."""
