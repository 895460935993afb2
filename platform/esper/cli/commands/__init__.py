"""What is typed: every command's options and help. What a command does is a module of `esper.cli`.

A command imports what it needs when it runs, so that `--help` is instant.
"""
