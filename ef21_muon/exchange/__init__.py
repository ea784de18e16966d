"""Who sends what to whom: layers in batches, their servers, the collectives of a round."""
