"""Everything that the server keeps on disk."""
