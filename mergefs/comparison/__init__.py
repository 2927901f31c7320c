"""How far two models are from each other, tensor by tensor, whether they are written or only planned."""
