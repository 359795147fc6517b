"""The kernels in Triton. Nothing here is imported before a call runs on them."""
