"""Where a model's folder is: bundled with macft, on this machine, or downloaded."""
