"""The gateway: one address for the fleet."""
