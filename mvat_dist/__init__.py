"""Distil one strong MANNER denoiser into a family of fast ones, on a cluster."""
