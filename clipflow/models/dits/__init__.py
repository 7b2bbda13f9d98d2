"""Diffusion transformers built from `clipflow.nn`."""
