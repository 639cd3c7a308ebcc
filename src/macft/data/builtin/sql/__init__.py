"""Questions over SQLite databases, answered in SQL."""
