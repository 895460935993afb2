"""The command line: `main` says which commands there are, a module each does what they do."""
