"""Interpolation of weights after a fit, between the model before it and the finetuned one."""
