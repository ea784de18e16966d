"""results/README.md and its figures are those of the logs, which are read by other code here."""

import json
import re
from itertools import pairwise
from statistics import mean

import matplotlib.image
import numpy as np
import pytest
from logs import END
from pictures import drawn_as_committed
from readme import README
from study_page import (
    PAGE,
    end,
    first_table,
    gap,
    last_of,
    logs,
    moved,
    section,
    seeds_of,
    table_after,
)

from scripts.shakespeare import figures
from scripts.shakespeare.figures import FIGURES
from scripts.shakespeare.page import page
from scripts.shakespeare.results import LOGS, RESULTS, closest, fewest, read
from scripts.shakespeare.runs import SETTINGS, Setting
from scripts.shakespeare.runs import STUDY as STUDY_LISTS
from training.renamed import modern_label

TEXT_OF_PAGE, TEXT_OF_README = (" ".join(text.split()) for text in (PAGE, README.replace("*", "")))
OTHERS = (
    *("muon", "adamw", "powersgd", "greedylore", "dion", "demo"),
    *("diloco", "muloco", "sparseloco"),
)
STUDY = [name for name in SETTINGS if "/" not in name]


def points(run):
    """[(sizes sent and received, test loss)] of a run."""
    record, evals = logs()[run]
    config, size = record["config"], 4 * record["parameters"]
    found = []
    for one in evals:
        if "received_bytes" in one:
            back = one["received_bytes"]
        elif config["s2w"]["_target_"].endswith(".Identity"):
            back = one["w2s_bytes"]  # of the other worker
        else:
            back = one["s2w_bytes"]
        found.append(((one["w2s_bytes"] + back) / size, one["test_loss"]))
    return found


def sizes_of(name):
    """Sent and received in the whole run, of the first seed."""
    return points(f"{name}-seed0")[-1][0]


TARGET = mean(
    next(one["test_loss"] for one in logs()[run][1] if one["step"] == 450)
    for run in seeds_of("identity")
)


def to_target(points, target=TARGET):
    for (sent, loss), (more, lower) in pairwise(points):
        if lower <= target < loss:
            return sent + (more - sent) * (loss - target) / (loss - lower)
    return None


def sizes_to_target(name):
    reached = [to_target(points(run)) for run in seeds_of(name)]
    return mean(reached) if all(reached) else None


def is_ours(name):
    return name != "identity" and not name.startswith(OTHERS)


def number(cell):
    return float(cell.rstrip(" %x").replace(",", ""))


def near(cell):
    return pytest.approx(number(cell), rel=0.006)


@pytest.fixture(scope="module")
def results():
    return read()


def test_the_committed_page_is_up_to_date(results):
    assert page(results) == PAGE
    assert all(len(line) <= 100 for line in PAGE.splitlines() if line[:1] not in "|!")


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_figures_are_up_to_date(results, name, drawn, tmp_path):
    FIGURES[name](results, tmp_path)
    assert drawn.keys() == {name} and drawn_as_committed(drawn[name], RESULTS / f"{name}.svg")
    assert (RESULTS / f"{name}.png").exists()


def test_all_that_is_drawn_from_the_logs_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.study, "RESULTS", tmp_path / "study")
    monkeypatch.setattr(figures, "FIGURES", {"envelopes": FIGURES["envelopes"]})
    (tmp_path / "study").mkdir()
    assert figures.main() == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert written == {
        "README.md",
        *(f"study/{name}" for name in ("envelopes.png", "envelopes.svg", "summary.json")),
    }
    study = tmp_path / "study"
    mine, theirs = (matplotlib.image.imread(d / "envelopes.png") for d in (study, RESULTS))
    assert mine.shape == theirs.shape and np.abs(mine - theirs).mean() < 0.01


def test_a_run_that_has_not_been_made_is_named(results):
    fewer = {name: one for name, one in results.items() if name != "rank20"}
    with pytest.raises(ValueError, match="names rank20, which has not run"):
        page(fewer)


def test_a_row_that_is_added_is_in_the_table_of_all_settings(tmp_path, monkeypatch):
    for path in LOGS.iterdir():
        (tmp_path / path.name).symlink_to(path)
    run, evals = logs()["rank5-seed0"]
    records = [run | {"label": "mine"}, *evals, END]
    lines = (json.dumps(record | {"name": "mine-seed0"}) + "\n" for record in records)
    (tmp_path / "new.jsonl").write_text("".join(lines))
    monkeypatch.setitem(STUDY_LISTS, "new", [Setting("mine", "mine", "optimizer=mine")])
    rows = table_after("All settings", page(read(tmp_path)))[1]
    of_mine, of_rank5 = (
        [row[1:] for row in rows if row[0] == name] for name in ("mine", "rank 5%")
    )
    assert of_mine == of_rank5 and len(of_mine) == 1


def test_the_page_names_what_has_not_run():
    runs = {one: len(setting.seeds) for one, setting in SETTINGS.items()}
    left = [name for name, seeds in runs.items() if len(seeds_of(name)) < seeds]
    assert f"Not run yet (`make study` does): {', '.join(left)}." in TEXT_OF_PAGE


def test_the_headline_is_what_the_logs_say(results):
    with_seeds = [name for name in STUDY if is_ours(name) and len(seeds_of(name)) == 3]
    reached = {name: size for name in with_seeds if (size := sizes_to_target(name))}
    least = min(reached, key=reached.get)
    few = [name for name in with_seeds if 100 * sizes_of(name) <= sizes_of("identity")]
    best = min(few, key=end)
    assert (fewest(results).setting.name, closest(results).setting.name) == (least, best)
    headline = " ".join(PAGE.split("\n\n")[2].split())
    assert headline in TEXT_OF_README
    times = sizes_to_target("identity") / reached[least]
    assert f" takes {times:,.0f} times fewer bytes, sent and received; " in headline
    assert headline.endswith(
        f"has a final test loss {gap(best):+.2f} % from the uncompressed run's with "
        f"{sizes_of('identity') / sizes_of(best):.0f} times fewer."
    )


def test_no_other_method_is_ahead_but_where_it_is_said():
    (said,) = (
        part
        for part in section("Against DiLoCo, MuLoCo and SparseLoCo?").split("\n\n")
        if part.startswith("By bytes sent")
    )
    said = " ".join(said.split())
    assert said in TEXT_OF_README
    ours = [points(run) for name in filter(is_ours, STUDY) for run in seeds_of(name)]
    lines = [np.array([point for point in line if point[0] > 0]).T for line in ours]

    def lowest(sizes):
        """Of ours with at most so many sizes, straight over their logarithm."""
        reached = []
        for sent, losses in lines:
            reached.append(losses.min(initial=np.inf, where=sent <= sizes))
            if sent[0] <= sizes <= sent[-1]:
                reached.append(np.interp(np.log(sizes), np.log(sent), losses))
        return min(reached)

    ahead = {
        name
        for name in STUDY
        if name.startswith(OTHERS)
        for sizes, loss in np.mean([points(run) for run in seeds_of(name)], axis=0)
        if sizes > 0 and loss < lowest(sizes) - 0.003  # seeds of ours are not averaged here
    }
    for family in {re.match(r"[a-z]+", name)[0] for name in ahead}:
        assert re.search(family, said, re.IGNORECASE), (family, said)


def test_the_readme_says_what_rounds_of_signs_cost():
    names = [f"local{every}-signs" for every in (4, 10, 30)]
    first, second, third = (f"{gap(name):+.1f} %" for name in names)
    fewer = [f"{sizes_of('identity') / sizes_of(name):.0f}" for name in names]
    assert (
        f"a sync every 4, 10 and 30 steps has a final loss {first}, {second} and {third} from the "
        f"uncompressed run's with {fewer[0]}, {fewer[1]} and {fewer[2]} times fewer bytes sent and "
        "received."
    ) in TEXT_OF_README
    for name, said in (
        (
            "local30-roles",
            "values=normal2`) a sync every 30 steps has a gap of {} with {} times fewer.",
        ),
        (
            "local4-signs-message",
            "but in the embedding, a sync every 4 steps has a gap of {} with {} times fewer:",
        ),
    ):
        fewer = f"{sizes_of('identity') / sizes_of(name):.0f}"
        assert said.format(f"{gap(name):+.1f} %", fewer) in TEXT_OF_README


def test_the_readme_counts_what_has_seeds():
    assert sum(len(seeds_of(name)) == 3 for name in STUDY) == 1 + 10
    assert "three seeds of the uncompressed run and of ten others" in TEXT_OF_README


def test_the_page_is_right_in_what_it_concludes():
    for served, without in ((3, 4), (6, 9), (12, 12)):
        assert end(f"served{served}") < end(f"fitted{without}")
    decays = [end(f"grid/served3-decay{decay}") for decay in (0.8, 0.92, 0.97)]
    assert decays[2] == min(decays)


def test_peers_stand_beside_the_best_of_ours_that_sends_as_much():
    _, rows = table_after("Against DiLoCo, MuLoCo and SparseLoCo?")
    found = []
    for _, sizes, its_end, _, our_sizes, our_end in rows:
        (peer,) = (
            name
            for name in STUDY
            if name.startswith(OTHERS)
            and f"{gap(name):+.2f} %" == its_end
            and sizes_of(name) == near(sizes)
        )
        best = min(
            (n for n in STUDY if is_ours(n) and sizes_of(n) <= 1.01 * sizes_of(peer)), key=end
        )
        assert f"{gap(best):+.2f} %" == our_end and sizes_of(best) == near(our_sizes)
        found.append(peer)
    asked = ("diloco", "muloco", "sparseloco", "demo")
    assert sorted(found) == sorted(name for name in STUDY if name.startswith(asked))


def test_ours_is_below_every_other_method_at_its_rate():
    _, rows = table_after("At the rates of other methods")
    assert len(rows) >= 10
    for _, its_bits, its_end, _, bits, our_end in rows:
        assert number(our_end) < number(its_end) and number(bits) <= 1.015 * number(its_bits)


def test_what_is_lost_at_the_end_is_what_the_logs_say():
    _, rows = table_after("Is nothing lost at the end?")
    assert len(rows) >= 5
    for times, _, ours, other, theirs in rows:
        enough = [n for n in STUDY if sizes_of("identity") >= number(times) * sizes_of(n)]
        assert f"{gap(min(filter(is_ours, enough), key=end)):+.2f} %" == ours
        of_others = [name for name in enough if name.startswith(OTHERS)]
        if not of_others:
            assert (other, theirs) == ("none", "")
            continue
        assert f"{gap(min(of_others, key=end)):+.2f} %" == theirs


def test_losses_and_sizes_of_more_workers_are_those_of_the_logs():
    heading, rows = table_after("With more workers?")
    counts = [int(cell.split()[0]) for cell in heading[1::2]]
    names = ("identity", "served6", "local4-signs", "local10-signs", "local30-signs")
    assert counts == [2, 4, 8]
    for name, (_, *cells) in zip(names, rows, strict=True):
        for n, loss, sizes in zip(counts, cells[::2], cells[1::2], strict=True):
            mine, plain = (one if n == 2 else f"workers/{n}-{one}" for one in (name, "identity"))
            assert {logs()[run][0]["world_size"] for run in seeds_of(mine)} == {n}
            over = "" if name == "identity" else f", {gap(mine, plain):+.1f} %"
            assert loss == f"{end(mine):.4f}{over}"
            last, size = last_of(mine)
            assert "received_bytes" not in last or moved(last, size) == near(sizes)


def test_what_may_help_eight_workers_and_a_gpu_is_as_in_the_logs():
    text = " ".join(section("With more workers?").split())
    for name in ("identity", "local4-signs", "local30-signs"):
        assert f"{end(f'workers/8-{name}-gpu'):.4f} (" in text
    tried = [name for name in SETTINGS if re.match(r"workers/8-local\d+-(?!.*gpu)", name)]
    assert len(tried) == 17
    for name in tried:
        over = f"{gap(name, 'workers/8-identity'):+.1f} %"
        assert f"| {end(name):.4f} | {over} | {moved(*last_of(name)):.3g} |" in text


def test_unlike_text_is_as_in_the_logs():
    for order in ("apart", "mixed"):
        for name in ("local4-signs", "local30-signs"):
            mine, plain = (f"genres/{order}-{one}" for one in (name, "identity"))
            assert f"| {end(mine):.4f} | {gap(mine, plain):+.2f} % |" in PAGE


def test_losses_and_bytes_of_larger_models_are_those_of_the_logs():
    one_token, three_tokens = section("Does it hold as the model grows?").split("With 3 tokens")
    _, rows = first_table(one_token)
    plain = {}
    names = [n for n in SETTINGS if re.match(r"sizes/\w[\w.]*-1-(?!radius|cpu)", n) and seeds_of(n)]
    assert len(rows) == len(names) >= 10
    for name in names:
        run, evals = logs()[f"{name}-seed0"]
        if name.endswith("-1-identity"):
            plain[run["parameters"]] = evals
        last, size = evals[-1], 4 * run["parameters"]
        sent = modern_label(run["label"]).replace("top 30% sign", "sign")  # which it was
        machine = {"cuda": "GPU", "cpu": "CPU"}[run["device"]]
        begins = [f"{run['parameters']:,}", sent, machine, f"{last['test_loss']:.4f}"]
        (cells,) = (row[4:] for row in rows if row[:4] == begins)
        assert run["world_size"] == 2 and moved(last, size) == near(cells[1])
        assert last["tokens"] == pytest.approx(run["parameters"], rel=0.03)
        of_plain = plain[run["parameters"]]
        over = 100 * (last["test_loss"] / of_plain[-1]["test_loss"] - 1)
        assert cells[0] == f"{over:+.2f} %"
        target = of_plain[8]["test_loss"]  # of twelve
        reached = to_target(
            [(0, np.inf), *((moved(one, size), one["test_loss"]) for one in evals)], target
        )
        if reached is None:
            assert cells[2:] == ["not reached", ""]
            continue
        assert reached == near(cells[2])
        assert moved(of_plain[8], size) / reached == near(cells[3])
    ends = {row[3] for row in first_table(three_tokens)[1]}
    assert ends == {
        f"{end(condition + name):.4f}"
        for condition in ("", "sizes/3M-3-")
        for name in ("identity", "local4-signs", "local30-signs", "local60-signs")
        if seeds_of(condition + name)
    }


def test_the_readme_has_numbers_of_a_larger_model_and_of_more_workers():
    sizes, eight = ("3M", "10M"), "workers/8-identity"

    def over(name, plain):
        return f"{gap(name, plain):+.1f} %"

    def fewer(name, plain):
        return f"{moved(*last_of(plain)) / moved(*last_of(name)):.0f}"

    plain = [f"sizes/{size}-1-identity" for size in sizes]
    every_4, every_30 = ([f"sizes/{size}-1-local{n}-signs" for size in sizes] for n in (4, 30))
    assert (
        "With a scale per row in place of one per layer, models of {} and {} M parameters have "
        "loss gaps of {} and {} to their uncompressed runs with {} and {} times fewer bytes, and "
        "with a sync every 30 steps of {} and {} where 0.8 M has {}, all with one token per "
        "parameter."
        "".format(
            *(f"{last_of(name)[1] / 4e6:.1f}" for name in plain),
            *map(over, every_4, plain),
            *map(fewer, every_4, plain),
            *map(over, every_30, plain),
            over("sizes/0.8M-1-local30-signs", "sizes/0.8M-1-identity"),
        )
    ) in TEXT_OF_README
    of_eight = [over(f"workers/8-local{n}-signs", eight) for n in (4, 10, 30)]
    more = [over(f"workers/8-local{n}-outer6", eight) for n in (10, 30)]
    assert (
        "Eight workers, who share the batch of two, have gaps of {}, {} and {} with a sync every "
        "4, 10 and 30 steps, with an outer momentum of 0.6 of {} and {} every 10 and 30; where "
        "servers send back 2 bits, ".format(*of_eight, *more)
    ) in TEXT_OF_README
    names = [f"workers/8-{name}" for name in ("local4-back", "local10-back6")]
    back, times = ([say(name, eight) for name in names] for say in (over, fewer))
    assert (
        f"{back[0]} every 4, and with 0.6 {back[1]} every 10, with {times[0]} and {times[1]} "
        "times fewer bytes."
    ) in TEXT_OF_README
