"""Other programs that run a compressed model: what each needs to take the factors as they are."""
