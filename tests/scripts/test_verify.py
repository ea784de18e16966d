"""Every claim of scripts/verify.py holds, and is seen to fail where what it claims is broken."""

import math
from itertools import chain

import pytest
from run import ROOT, torchrun
from workers.verify_broken import BROKEN

from ef21_muon import EF21Muon, layers
from ef21_muon.norms import Spectral
from ef21_muon.norms.lmo import BiasRMS
from ef21_muon.transport.fixed import Transport
from scripts import verify
from training.workers import Workers

OF_SEVERAL = {claim.text for claim in verify.CLAIMS if claim.of_several}


def wrap(patch, owner, name, change):
    """Change what a function returns."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments: change(original(*arguments)))


def lose_all(self, batches, payloads):
    """No message comes to the servers."""
    return lambda: [[] for _ in batches]


BROKEN_ALONE = {
    "identity equals Muon": lambda patch: patch.setitem(Spectral.scalings, "muon", math.hypot),
    "identity equals Scion": lambda patch: patch.setitem(BiasRMS.scalings, "scion", math.hypot),
    "buckets agree": lambda patch: wrap(patch, layers, "cut", lambda ranges: ranges[::-1]),
    "the servers' G": lambda patch: patch.setattr(Transport, "to_servers", lose_all),
    "w2s_bytes": lambda patch: patch.setattr(EF21Muon, "w2s_bytes", 1),
}


def find(start):
    """The claim whose text starts so."""
    (claim,) = (claim for claim in verify.CLAIMS if claim.text.startswith(start))
    return claim


def results(output):
    """What a printed table says, by claim."""
    return {
        claim.text: line.rsplit("  ", 1)[1]
        for claim in verify.CLAIMS
        for line in output.splitlines()
        if line.startswith(claim.text + "  ")
    }


def test_every_claim_holds_on_two_workers():
    output = torchrun(ROOT / "scripts" / "verify.py", ranks=2)
    assert results(output) == {claim.text: "pass" for claim in verify.CLAIMS}
    assert f"0 of {len(verify.CLAIMS)} claims fail" in output
    assert output.count("difference") == 1, "only rank 0 prints"


def test_one_worker_alone_has_nothing_to_compare(monkeypatch, capsys):
    """What claims of one worker say of it, they say of two as well; one of them is enough here."""
    claims = [find("identity equals Muon"), *filter(lambda one: one.of_several, verify.CLAIMS)]
    monkeypatch.setattr(verify, "CLAIMS", claims)
    assert verify.verify(Workers()) == 0
    found = results(capsys.readouterr().out)
    assert {text for text, result in found.items() if result == verify.NOT_COMPARED} == OF_SEVERAL
    assert {text for text, result in found.items() if result == "pass"} == set(found) - OF_SEVERAL
    assert len(found) == len(claims) > len(OF_SEVERAL)


def test_two_workers_that_break_claims_fail():
    with pytest.raises(AssertionError, match="claims fail") as failure:
        torchrun("verify_broken.py", ranks=2)
    rounds, agreement, _ = map(results, str(failure.value).split("claims fail"))
    for found, starts in zip((rounds, agreement), BROKEN.values(), strict=True):
        assert found == {find(start).text: "FAIL" for start in starts}


@pytest.mark.parametrize("start", BROKEN_ALONE)
def test_one_worker_that_breaks_a_claim_fails(monkeypatch, start):
    BROKEN_ALONE[start](monkeypatch)
    assert verify.row(find(start), Workers())[-1] == "FAIL"


def test_every_claim_is_seen_to_fail():
    starts = [*BROKEN_ALONE, *chain.from_iterable(BROKEN.values())]
    assert {find(start).text for start in starts} == {claim.text for claim in verify.CLAIMS}


def test_what_is_not_a_number_fails(monkeypatch, capsys):
    nan = verify.Claim("zero", "nothing", False, lambda workers: (math.nan, 1))
    monkeypatch.setattr(verify, "CLAIMS", [nan])
    assert verify.verify(Workers()) == 1
    assert "1 of 1 claims fail" in capsys.readouterr().out


def test_a_check_that_breaks_is_named(capsys):
    broken = verify.Claim("one is zero", "nothing", False, lambda workers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify.row(broken, Workers())
    assert "rank 0: the check of 'one is zero' broke" in capsys.readouterr().err
