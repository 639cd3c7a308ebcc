"""What a loaded model's code can do, found by running it on a few tokens."""
