"""What a budgeted merge is expected to differ from the full one, and by how much it can at most."""
