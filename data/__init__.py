"""Token shards: how they are made, checked and read."""
