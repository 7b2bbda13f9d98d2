"""Modules: parameters around the fused ops of `clipflow.ops`."""
