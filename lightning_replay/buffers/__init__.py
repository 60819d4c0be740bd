"""Rows of tokens to replay: in memory, in files and in folders of shards."""
