"""The schedule checker: what schedules do (`program`, `block_events`), on which inputs, and `machine`, which judges."""
