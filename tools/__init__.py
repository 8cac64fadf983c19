"""A package of its own, so that no other file of that name on Python's path is taken for it."""
