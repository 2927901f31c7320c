"""What is measured, one module for each question; ``catalogue`` has the order."""
