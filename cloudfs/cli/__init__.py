"""The command line: arguments, configuration, environment, output, exit codes.

``main`` holds the table of commands, each of which lies in a module of its own that is imported
only when it is run. A command gets an :class:`cloudfs.cli.app.App`, through which it finds
policies, opens repositories and prints; it raises :class:`cloudfs.core.errors.CloudfsError` for
what goes wrong and ``click.exceptions.Exit`` for an exit code of its own.
"""
