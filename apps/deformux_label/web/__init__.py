"""What stands between the network and the app: who may call what, and how much of it."""
