"""A worker of a fleet among unlike processors: `unlike_fleet.py NUMBER FOLDER URL URL ...`.

A run with each of FLEETS, at a lighthouse of its own. Writes FOLDER/NUMBER.json.
"""

import json
import sys
from pathlib import Path

import torch
from waiting import wait_until
from workers.unlike import NESTEROV, RANK, new_model

from ef21_muon import LocalSteps
from ef21_muon.compressors import Quantize, QuantizedRank
from ef21_muon.fleet import Fleet, FleetRefused
from ef21_muon.transport.agreement import fingerprint

FLEETS = {  # all but the last train with both workers
    "normal2": Quantize("normal2"),
    "sign": Quantize("sign"),
    "rank": RANK,
    "quantized rank": QuantizedRank(0.4),
}
TOGETHER = ("normal2", "sign")
ROUNDS = 6


def train(number: int, url: str, name: str, folder: Path) -> dict:
    """How it went: the quorums, W at the end, or the error."""
    model, refused = new_model(), folder / f"{name} refused"
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    fleet = Fleet(number, url)
    optimizer = LocalSteps(inner, w2s=FLEETS[name], transport=fleet, **NESTEROV)
    try:
        fleet.join()
        while optimizer.round < ROUNDS or not (name in TOGETHER or refused.exists()):
            model.zero_grad()
            inputs = torch.rand(8, 48, generator=torch.Generator().manual_seed(number))
            model(inputs).square().mean().backward()
            optimizer.step()
    except FleetRefused as error:
        refused.touch()
        return {"error": str(error)}
    wait_until(lambda: all(one.exists() for one in ends(folder, name, number)))
    fleet.leave()
    quorums = [[one.messages, one.healed, one.diverged] for one in fleet.quorums]
    state = [fingerprint(batch.state["global_params"]).item() for batch in optimizer.batches]
    return {"quorums": quorums, "state": state, "synced_steps": fleet.synced_steps}


def ends(folder: Path, name: str, number: int) -> list[Path]:
    """What workers who are to end together write: who leaves first leaves the other a round."""
    if name not in TOGETHER:
        return []
    (folder / f"{name} {number}").touch()
    return [folder / f"{name} {one}" for one in range(2)]


def main() -> None:
    number, folder, urls = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    report = {
        name: train(number, url, name, folder) for name, url in zip(FLEETS, urls, strict=True)
    }
    (folder / f"{number}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
