"""The web server: routes, login, limits and the audit log."""
