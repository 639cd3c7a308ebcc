"""Tab completion of the program ``macft`` for bash, zsh and fish."""
