"""Work between the exchanges of a dispatch: indices, gathers and sums, by torch's operations or by fused kernels."""
