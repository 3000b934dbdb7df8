"""Fine-tuning a gated model so that it also writes well with stochastic and RELU activations."""
