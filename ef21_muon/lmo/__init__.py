"""What a step is: norms with their linear minimisation oracles, and which layer has which."""
