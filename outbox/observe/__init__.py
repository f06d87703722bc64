"""Metrics, traces and health of relays and listeners; nothing here is needed to run them."""
