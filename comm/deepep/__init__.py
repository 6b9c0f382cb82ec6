"""DeepEP behind the dispatcher's interface."""
