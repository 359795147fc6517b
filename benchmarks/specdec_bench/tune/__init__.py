"""`specdec bench tune`: method and sizes for a device."""
