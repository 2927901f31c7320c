"""Keeping the catalog small: what nothing needs any more is found and removed."""
