"""The synthetic corpus of the demonstration: voices, noises, rooms."""
