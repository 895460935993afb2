"""Evidence: records, the statistics over them, the verdicts, and their verification."""
