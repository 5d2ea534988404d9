"""The command line, tested through the program itself."""
