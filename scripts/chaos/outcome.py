"""What came of a run: how long workers waited, and whether they agreed."""

from scripts.chaos.crew import Crew
from scripts.chaos.faults import bound


def longest_wait(crew: Crew, fault: dict) -> dict:
    """In the rounds of a fault: of workers to which nothing happened, and what is promised."""
    spared = [one for one in crew.jobs if fault["kind"] == "lighthouse" or one != fault["worker"]]
    waits = [
        one["seconds"]
        for worker in spared
        for one in crew.records(worker)
        if one["record"] == "membership"
        and one["step"] is not None
        and fault["step"] < one["step"] <= fault["until_step"]
    ]
    promised = bound(fault["kind"], fault["lasts"], crew.pace)
    return {"longest_wait": max(waits, default=0.0), "promised": round(promised, 1)}


def outcome(crew: Crew) -> dict:
    """What the workers have agreed on: in every round, and at the end."""
    histories: dict[int, set] = {}
    diverged = 0
    for worker in crew.jobs:
        for one in crew.records(worker):
            if one["record"] == "membership" and one["step"] is not None:
                histories.setdefault(one["step"], set()).add(one["state"])
                diverged += "had another history" in one["why"]
    ends = [crew.records(worker)[-1] for worker in crew.jobs]
    completed = [one for one in ends if one.get("status") == "completed"]
    return {
        "rounds_seen": len(histories),
        "rounds_with_two_histories": sum(len(states) > 1 for states in histories.values()),
        "had_another_history": diverged,
        "workers_completed": len(completed),
        "equal_at_the_end": len(completed) == len(crew.jobs)
        and len({(one["state"], one["test_loss"]) for one in completed}) == 1,
        "tokens": completed[0]["tokens"],
        "test_loss": completed[0]["test_loss"],
    }
