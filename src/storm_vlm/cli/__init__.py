"""The `storm` command: one file per subcommand; each parses, calls one function and prints."""
