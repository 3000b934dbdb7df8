"""Kernels: one folder a device, each tested against the plain PyTorch reference in `engine.kernels.reference`."""
