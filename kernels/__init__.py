"""Fused kernels for GPUs"""
