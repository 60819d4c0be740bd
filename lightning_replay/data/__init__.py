"""Datamodules: the one that mixes replay rows into batches, and those that read text and chat."""
