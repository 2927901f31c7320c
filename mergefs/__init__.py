"""mergefs: a merged LLM checkpoint that exists as a plan, not as bytes."""

__version__ = "0.1.0"
