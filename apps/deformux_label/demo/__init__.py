"""``make demo``: a simulated radiologist teaches the network through a real server."""
