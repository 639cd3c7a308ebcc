"""Answers by a model that is spread over the machines of a cluster: the ranks, and the one that leads them."""
