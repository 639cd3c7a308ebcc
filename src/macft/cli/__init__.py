"""What all commands share: the list of commands, argument parsing, exit status and one-line errors."""
