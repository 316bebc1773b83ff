"""The method: from covariances to ranks and factors. Tensors and numbers only; imports nothing of drank beside it."""
