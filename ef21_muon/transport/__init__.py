"""How messages travel: between workers that stay, and between the ranks of one worker."""
