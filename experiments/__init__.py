"""The experiments of this folder; ``tools`` has their commands, run from the repository's root."""
