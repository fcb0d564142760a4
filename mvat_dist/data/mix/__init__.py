"""From shards to segments: what comes when, and how speech, noise and rooms become a mixture."""
