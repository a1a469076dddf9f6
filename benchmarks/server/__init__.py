"""Speed of the annotation server, of inference and of clicks."""
