"""Rules of the migration: feature flags, phases with targets, and the judge of a rollout."""
