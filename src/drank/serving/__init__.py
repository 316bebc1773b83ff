"""Programs that run the factors: one module per runtime."""
