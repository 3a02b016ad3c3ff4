"""The schedule checker's parts: what a schedule does (`events`), on which inputs, and the machine that judges it."""
