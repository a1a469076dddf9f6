"""Speed of the operator and of the layers that use it."""
