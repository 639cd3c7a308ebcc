"""What a model's files say without loading it: sizes, digests, tokens and positions."""
