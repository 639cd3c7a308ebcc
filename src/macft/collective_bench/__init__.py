"""Measuring collectives: ranks in processes of their own, several implementations by turns, tables and plots."""
