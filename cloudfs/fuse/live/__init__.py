"""The live mount: the tree itself, with every change marked before it happens."""
