"""Number formats, quantisation, linear layers."""
