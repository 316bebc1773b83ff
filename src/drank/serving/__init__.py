"""Other programs that run the factors: one module per program, or per form of ``drank export``."""
