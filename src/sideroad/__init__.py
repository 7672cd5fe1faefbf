"""sideroad: low-rank adaptation of language models, exact, visible, and fast on the machine you have."""

__version__ = "0.1.0"
