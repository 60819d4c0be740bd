"""The page that shows what runs have logged."""
