"""Object stores: one small protocol, a module for each kind of store and each wrapper."""
