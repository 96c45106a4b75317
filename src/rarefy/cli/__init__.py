"""The command line: `rarefy COMMAND`, one file a command."""
