"""Which bytes to buy: numbers in, numbers out. Nothing here knows of files, tensors' names or methods.

``offers`` says what may be bought of one tensor and what it is worth, ``chains`` in which order each of its cells is
worth buying, ``spending`` what a budget buys of all tensors.
"""

from mergefs.planner.allocation.offers import Offer, correlations, together
from mergefs.planner.allocation.spending import Allocation, allocate
from mergefs.planner.allocation.steps import BYTES_OF_A_STEP

__all__ = ["BYTES_OF_A_STEP", "Allocation", "Offer", "allocate", "correlations", "together"]
