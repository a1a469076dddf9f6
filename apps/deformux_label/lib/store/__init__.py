"""What the server keeps on the disk."""
