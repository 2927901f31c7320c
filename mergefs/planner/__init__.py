"""From a recipe to a plan: which tensors, computed from what, laid out in which files, and which bytes are bought."""
