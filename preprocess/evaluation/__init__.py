"""Bases on the moments of their own tokens, of two parts of them, and of another store."""
