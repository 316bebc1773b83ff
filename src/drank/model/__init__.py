"""Language models: where the linears are, how to watch them, what replaces them, how they are saved."""
