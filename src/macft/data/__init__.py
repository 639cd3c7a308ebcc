"""Datasets: sources, row formats, the order of rows, batches."""
