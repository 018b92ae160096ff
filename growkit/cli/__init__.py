"""The command line: one command a file, one sink for output, one handler for errors."""
