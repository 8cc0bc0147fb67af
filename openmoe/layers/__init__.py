"""Layers, one idea a file. Layers return (y, aux); losses are return values, never globals."""
