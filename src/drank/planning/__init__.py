"""What a run will take, before it is started: stages, seconds, bytes, from parameters and a model's shape."""
