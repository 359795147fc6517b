"""Fused Triton kernels and their torch references; imports nothing of specdec."""
