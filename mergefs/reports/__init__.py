"""What people are shown of plans: tables, heat maps and curves, as values that need no terminal and no catalog."""
