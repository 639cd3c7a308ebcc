"""Answers of a model whose blocks are spread over the ranks of a cluster."""
