"""All faults: what they are of is in the rooms."""

from tests.mutants import codecs, rivals, rounds, runs, steps, wire

MUTATIONS = [one for room in (steps, rounds, codecs, wire, rivals, runs) for one in room.MUTATIONS]
