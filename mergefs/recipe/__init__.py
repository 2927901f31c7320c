"""Recipes: mergekit configs, their parameters, and the layers that gradients run over."""
