"""The study's figures, page and findings are those of its logs, and its claims are right."""

from statistics import mean

import matplotlib.image
import numpy as np
from logs import write_study_log

from scripts.shakespeare import figures as study_figures
from scripts.shakespeare import results as study_results
from scripts.shakespeare import run as study
from scripts.shakespeare.findings import PEERS_TEXT, PLACE, ROUNDS_TEXT, TEXT, findings
from scripts.shakespeare.report import page
from scripts.shakespeare.results import read, read_replay, target_loss
from scripts.shakespeare.rivals import at_their_rate
from scripts.shakespeare.rounds import headline, where_others_are_ahead
from scripts.shakespeare.settings import SETTINGS, Setting


def test_rivals_are_met_at_their_rate(tmp_path):
    """Ours may send a hundredth more, not a tenth, and of what remains the lowest loss counts."""
    settings = [
        Setting("identity", "identity", ()),
        Setting("demo", "DeMo", ()),
        *(Setting(name, "rank", ()) for name in ("less", "same", "more")),
    ]
    for name, loss, sent in (
        *(("identity", 1.0, 800), ("demo", 2.0, 100)),
        *(("less", 1.9, 50), ("same", 1.8, 101), ("more", 1.5, 110)),
    ):
        write_study_log(tmp_path / f"{name}-seed0.jsonl", [3.0, loss], bytes_a_step=sent)
    assert at_their_rate(read(tmp_path, settings)) == {"demo": "same"}


def test_the_readme_is_right_that_ours_is_ahead_of_other_methods():
    results = read(study.RESULTS)
    met = at_their_rate(results)
    assert {"powersgd16", "dion15-normal4", "demo32", "demo128"} <= met.keys()
    for other, ours in met.items():
        assert mean(results[ours].final) < mean(results[other].final), (ours, other)


def test_the_findings_are_right_that_momentum_at_the_server_is_better():
    results = read(study.RESULTS)
    for served, without in ((3, 4), (6, 9), (12, 12)):
        ours, ef21 = results[f"served{served}"], results[f"fitted{without}"]
        assert mean(ours.final) < mean(ef21.final)


def test_the_page_is_right_about_the_decay_that_ends_lowest():
    results = read(study.RESULTS)
    of_decays = {decay: mean(results[f"grid/served3-decay{decay}"].final) for decay in (0.8, 0.92)}
    assert mean(results["grid/served3-decay0.97"].final) < min(of_decays.values())


def test_the_committed_figures_and_tables_are_up_to_date(tmp_path):
    """The page byte for byte; figures as pictures, since fonts may differ in a pixel."""
    assert (study.RESULTS.parent / "README.md").read_text() == page(study.RESULTS)
    written = study_figures.draw(study.RESULTS, tmp_path)
    pictures = [path for path in written if path.suffix == ".png"]
    assert pictures
    for path in pictures:
        mine, theirs = (
            matplotlib.image.imread(path),
            matplotlib.image.imread(study.RESULTS / path.name),
        )
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).mean() < 0.01


def test_the_readme_has_the_headline():
    readme = " ".join((study.ROOT / "README.md").read_text().replace("*", "").split())
    results = read(study.RESULTS)
    assert headline(results, target_loss(results["identity"])) in readme
    assert where_others_are_ahead(results) in readme


def test_findings_are_written_where_their_runs_are_done():
    results = read(study.RESULTS)
    target, replayed = study_results.target_loss(results["identity"]), read_replay(study.RESULTS)
    written = findings(results, target, replayed)
    assert written.count("**") == 2 * len(written.split("\n\n"))
    assert all(len(line) <= 100 for line in written.splitlines())
    of_ranks = "rank 20, 15, 10 and 5 % save"
    assert of_ranks in " ".join(written.split())
    without = {name: result for name, result in results.items() if name != "rank20"}
    assert of_ranks not in " ".join(findings(without, target, {}).split())


def test_findings_speak_of_settings_alone():
    text = "".join(file.read_text() for file in (TEXT, ROUNDS_TEXT, PEERS_TEXT))
    names = {name for _, several in PLACE.findall(text) for name in several.split()}
    assert names <= {setting.name for setting in SETTINGS}
