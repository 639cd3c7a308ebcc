"""Elastic runs: heartbeats, agreement on the members, and a ring that is formed again when they change."""
