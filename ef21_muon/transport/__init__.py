"""Who sends what to whom: servers, workers of several ranks, and the collectives of a round."""
