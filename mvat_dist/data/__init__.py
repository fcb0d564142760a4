"""Corpora, shards, and the stream of training segments made from them."""
