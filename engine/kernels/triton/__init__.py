"""Triton kernels for GPUs. Needs the package triton; imported only where a GPU, or Triton's interpreter, is wanted."""
