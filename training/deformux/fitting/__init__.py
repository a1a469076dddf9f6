"""Training a network on labelled volumes."""
