"""Triton kernels, their plain-torch twins and the dispatch between them."""
