"""The parts of the page, one module for each question; each says what was aimed at, too."""
