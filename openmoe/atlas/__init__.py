"""The routing atlas: records of what routers decide, what follows from them, and experiments."""
