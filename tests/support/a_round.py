"""What a round of an optimizer takes, counted without sending."""

from ef21_muon.transport.load import dry_round


def a_round(optimizer):
    """Its Traffic, as in the next step."""
    transport = optimizer.transport
    return dry_round(optimizer.batches, transport.rank, transport.ranks)
