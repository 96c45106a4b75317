"""Model, data and loop put together: one file a task."""
