"""scripts/verify.py with ef21_muon broken in one way after another, each in a table of its own.

A table has the claims that should fail, of one placement and one compressor where they are of each.
The exit status is that of the way which verify.py finds least fault with.
"""

import pytest
import torch
import torch.distributed as dist

from ef21_muon import EF21Muon
from ef21_muon.channel import Channel
from ef21_muon.communicating import Communicating
from ef21_muon.compressors import from_spec
from ef21_muon.transport.fixed import Transport
from ef21_muon.values.base import BFloat16
from scripts import verify
from training.workers import Workers, exit_process


def break_rounds(patch: pytest.MonkeyPatch) -> None:
    """Error feedback is dropped, and servers use rank 0's message alone."""
    encode, to_servers = Channel.encode, Transport.to_servers

    def forgetful_encode(self, *arguments, **options):
        if self.feedback == "ef21":
            self.buffer.zero_()
        return encode(self, *arguments, **options)

    def of_rank0(self, batches, payloads):
        arrive = to_servers(self, batches, payloads)
        return lambda: [messages[:1] for messages in arrive()]

    patch.setattr(Channel, "encode", forgetful_encode)
    patch.setattr(Transport, "to_servers", of_rank0)


def break_agreement(patch: pytest.MonkeyPatch) -> None:
    """On rank 1, a last bit of a parameter and of decoded bfloat16, and a byte in both counts.

    Where every rank serves every layer the parameter changes on all of them.
    """
    step, decode = EF21Muon.step, BFloat16.decode
    w2s_bytes, wire_tx_bytes = EF21Muon.w2s_bytes.fget, Communicating.wire_tx_bytes.fget
    infinity = torch.tensor(torch.inf)

    def perturbed_step(self):
        step(self)
        if dist.get_rank() == 1 or self.server == "replicated":
            entry = self.param_groups[0]["params"][0].detach().view(-1)[:1]
            entry.copy_(entry.nextafter(infinity))

    def perturbed_decode(self, *payload):
        values = decode(self, *payload)
        return values.nextafter(infinity) if dist.get_rank() == 1 else values

    patch.setattr(EF21Muon, "step", perturbed_step)
    patch.setattr(BFloat16, "decode", perturbed_decode)
    patch.setattr(EF21Muon, "w2s_bytes", property(lambda self: w2s_bytes(self) + dist.get_rank()))
    more = property(lambda self: wire_tx_bytes(self) + dist.get_rank())
    patch.setattr(Communicating, "wire_tx_bytes", more)


# What fails on two workers, by the start of its text.
BROKEN = {
    break_rounds: (
        "identity equals Muon",
        "identity equals Scion",
        "n workers equal one",
        "a round of local steps",
        "the servers' G",
    ),
    break_agreement: (
        "placements agree",
        "all workers hold the same parameters",
        "w2s_bytes",
        "wire_tx_bytes",
        "messages decode alike",
    ),
}


FEWER = {
    "PLACED": verify.PLACED[:1],
    "LOCAL": verify.LOCAL[:1],
    "COMPRESSORS": [from_spec("rank:0.2:bfloat16")],
}


def verify_broken(workers: Workers) -> int:
    statuses = []
    for breaking, starts in BROKEN.items():
        with pytest.MonkeyPatch.context() as patch:
            claims = [claim for claim in verify.CLAIMS if claim.text.startswith(starts)]
            patch.setattr(verify, "CLAIMS", claims)
            for name, fewer in FEWER.items():
                patch.setattr(verify, name, fewer)
            breaking(patch)
            statuses.append(verify.verify(workers))
    return min(statuses)


if __name__ == "__main__":
    workers = Workers()
    exit_process(workers.run(lambda: verify_broken(workers)))
