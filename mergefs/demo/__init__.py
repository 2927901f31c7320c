"""A demonstration on models that are trained on the spot: `mergefs demo`."""
