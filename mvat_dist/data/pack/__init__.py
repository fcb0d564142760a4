"""From corpora to shards: find, inspect, plan, write, verify, sum up."""
