"""Usage, entropy and perplexity of a codebook, as an `evaluate` module."""
