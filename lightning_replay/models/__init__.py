"""Finding the causal language model in a LightningModule and asking it; a LightningModule for those who have none."""
