"""The history of the tables: one file a step, each of which the release before can still work with."""
