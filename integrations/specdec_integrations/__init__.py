"""Plug-ins for serving engines, and the embedded server."""
