"""The cost of a run before it is started: stages, seconds, bytes, from parameters and a model's shape."""
