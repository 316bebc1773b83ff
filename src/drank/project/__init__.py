"""A project on a disk: parameters, files, sources, what DVC and git recorded. Imports nothing of drank beside it."""
