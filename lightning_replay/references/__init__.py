"""The reference model π: a copy, an adapter switched off, cached log-probabilities or a moving average."""
