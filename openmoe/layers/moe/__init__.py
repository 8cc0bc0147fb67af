"""Mixtures of experts: router, dispatch, exchange, experts."""
