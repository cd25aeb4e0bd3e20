"""Opta-LMX: a headless inference server for MLX models with the OpenAI API."""

__version__ = "0.1.0"
