"""What drank knows of language models: where the linears are, how to watch them, what replaces them."""
