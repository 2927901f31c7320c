"""What a budget buys: every way to spend it on families that are really trained, measured (measure_budget.py)."""
