"""The demo: a small transformer learns a sequence of tasks, without and with replay."""
