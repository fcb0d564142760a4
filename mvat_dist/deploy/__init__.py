"""A trained network outside of training: whole recordings, other formats, model cards."""
