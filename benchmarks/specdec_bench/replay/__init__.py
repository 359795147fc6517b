"""`specdec bench replay`: recorded answers through n-gram methods."""
