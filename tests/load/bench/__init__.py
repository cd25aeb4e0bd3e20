"""``scripts/bench``: what the server costs over the engine it wraps, and what it promises, measured in one run.

``__main__`` reads the command line, ``session`` interleaves the rounds, one module a scenario asks and takes times,
``book`` keeps the samples, ``report`` and ``promises`` say what they mean. Not part of the tests.
"""
