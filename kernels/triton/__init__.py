"""Sources of kernels in Triton's language; each module is imported when one of its kernels is launched"""
