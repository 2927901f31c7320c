"""Delta planes: experts' deltas in embedded codes, kept in files beside the catalog, for budgets to buy in part."""
