"""What a project is: its options, checked."""
