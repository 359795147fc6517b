"""Triton runs in processes of its own, which `make test-kernels` starts.

In one of them its interpreter is on before anything is imported, in the other it is off.
"""

collect_ignore = ["interpreted", "compiled"]
