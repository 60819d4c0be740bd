"""Benchmarks of a language model that trains: tasks of lm-evaluation-harness, and what is made of their results."""
