"""The server's options, declared and checked."""
