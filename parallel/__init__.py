"""Layout, schedules, executor and optimizer."""
