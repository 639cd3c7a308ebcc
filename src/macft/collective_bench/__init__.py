"""Benchmarks of collectives: several implementations measured in turns, with ranks in processes of their own."""
