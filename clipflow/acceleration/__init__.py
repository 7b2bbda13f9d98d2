"""Fused ops put into stock diffusers models: `accelerate(module)`, instance by instance."""

from clipflow.acceleration.replace import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
