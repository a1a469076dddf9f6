"""Active learning: scores of unlabelled volumes, and strategies that choose which of them to label next."""
