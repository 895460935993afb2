"""Training: tasks, hosts, and the trainer whose interval returns a report."""
