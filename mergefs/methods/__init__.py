"""Merge methods: what each declares, and their registry."""
