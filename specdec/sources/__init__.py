"""n-gram sources in plain Python and numpy, without torch: engine plug-ins share them."""
