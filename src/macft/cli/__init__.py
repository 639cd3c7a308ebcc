"""What all commands share: exit status and one-line errors."""
