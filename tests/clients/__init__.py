"""The OpenAI contract, proven by programs that were written elsewhere."""
