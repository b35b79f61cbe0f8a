"""Load for an HTTP server that comes when it is due, not when the server is ready for it."""
