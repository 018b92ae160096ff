"""growkit: make a trained transformer larger, prove it computes the same function, train it on.

Importing this package imports neither torch nor transformers; the modules that compute with
them (``attention``, ``modeling``, ``verify``, ``training``) do.
"""

__version__ = "0.1.0"
