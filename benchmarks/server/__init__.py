"""Speed of the annotation server and of what it answers with."""
