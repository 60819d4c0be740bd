"""The callbacks that a user adds to a Trainer."""
