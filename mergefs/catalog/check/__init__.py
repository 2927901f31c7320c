"""``mergefs catalog check``: whether everything in the catalog is as it must be, and what to do where it is not."""
