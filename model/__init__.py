"""The DeepSeek architecture in phases."""
