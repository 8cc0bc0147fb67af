"""A server of one model: slots of a cache, requests that join and leave between steps, HTTP."""
