"""Runs merged models with transformers, to compare them before any is written."""
