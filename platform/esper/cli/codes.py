"""Exit codes that more than one command has; the text of `esper.cli.main` says what they mean."""

WRONG, MISSING, INCOMPLETE, UNHEALTHY, INTERRUPTED, UNREAD = 2, 3, 4, 5, 130, 141
