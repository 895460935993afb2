"""Monitoring: every metric of the platform in one table, and what shows and watches them."""
