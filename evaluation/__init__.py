"""How good and how diverse a model's three activations are: perplexity, zeros, best-of-N answers, agreement."""
