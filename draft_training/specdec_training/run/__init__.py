"""A run: optimiser steps, measurements, checkpoints, and where all of it is written down."""
