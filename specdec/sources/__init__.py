"""n-gram sources in plain Python, without torch: engine plug-ins share them."""
