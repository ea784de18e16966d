"""What is done with a finished run: its model loaded, text sampled, its log mirrored to wandb."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from readme import blocks
from run import script
from workers.resume import run_alone

import sample
from data.loader import TestWindows
from sample import generate, load_model
from scripts.to_wandb import history
from training.config import compose
from training.data import open_data
from training.records import read_log
from training.workers import RunError


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("after") / "run"
    run_alone(directory, *small, "checkpoint.every=2")
    return directory


def test_the_loaded_model_is_the_trained_one(run, small):
    """Its loss on the test windows is the one that the run logged last."""
    model = load_model(run)
    config = compose(tuple(small)).config
    _, tokens = open_data(config)
    windows = TestWindows(tokens, config.model.context, config.eval.tokens)
    with torch.no_grad():
        losses = [model(*batch).item() for *batch, _ in windows.batches(0, 1, 1)]
    logged = read_log(run / "metrics.jsonl").evals[-1]["test_loss"]
    assert sum(losses) / len(losses) == pytest.approx(logged, rel=1e-5)


def test_the_two_lines_of_the_readme_load_it(run):
    scope = {}
    lines = next(code for code in blocks("python") if "load_model" in code)
    exec(lines.replace("runs/mine", str(run)), scope)
    assert torch.equal(scope["model"].embedding.weight, load_model(run).embedding.weight)


def test_a_process_of_a_job_of_several_loads_it_alone(run, monkeypatch, capsys):
    """As in a notebook inside of it."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["sample.py", str(run), "To be", "--tokens", "3"])
    assert sample.main() == 0
    assert capsys.readouterr().out.startswith("To be")


def test_sampling_follows_the_models_probabilities(run):
    model = load_model(run)
    draws = [
        generate(model, [5], 1, 1.0, torch.Generator().manual_seed(seed))[0] for seed in range(400)
    ]
    with torch.no_grad():
        expected = model(torch.tensor([[5]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(draws), minlength=256)
    likely = expected.topk(20).indices
    deviation = (400 * expected[likely] * (1 - expected[likely])).sqrt()
    # 20 entries within 5 deviations: a false alarm in fewer than 1 of 10^4 seeds of the model
    assert ((counts[likely] - 400 * expected[likely]).abs() <= 5 * deviation + 1).all()


def test_text_is_longer_than_the_context_and_repeats_with_the_seed(run, monkeypatch, capsys):
    """In a process of its own, and again and otherwise in this one."""
    arguments = ["sample.py", str(run), "To be", "--tokens", "50"]
    first, texts = script(*arguments).stdout, []
    for seed in ([], ["--seed", "1"]):
        monkeypatch.setattr("sys.argv", [*arguments, *seed])
        assert sample.main() == 0
        texts.append(capsys.readouterr().out)
    again, other = texts
    assert first.startswith("To be") and len(first) > 40
    assert first == again != other


@pytest.fixture(scope="module")
def padded(small, tmp_path_factory) -> Path:
    """A run whose model has room for more tokens than there are bytes."""
    directory = tmp_path_factory.mktemp("padded") / "run"
    run_alone(directory, *small, "steps=1", "model.vocab_size=512")
    return directory


SAMPLED = {  # prompts and options
    "hot": ("To be", "--temperature", "1e6"),
    "hottest": ("To be", "--temperature", "1e300"),
    "cold": ("To be", "--temperature", "1e-30"),
    "coldest": ("To be", "--temperature", "5e-324"),
    "other letters": ("Ça, 東京", "--temperature", "9"),
    "no UTF-8": ("\udcff\udce7", "--temperature", "9"),
    "white space": (" ",),
}


@pytest.mark.parametrize("what", SAMPLED)
def test_what_is_sampled_is_text(padded, monkeypatch, capsys, what):
    prompt, *options = SAMPLED[what]
    monkeypatch.setattr("sys.argv", ["sample.py", str(padded), prompt, "--tokens", "40", *options])
    assert sample.main() == 0
    expected = prompt.encode(errors="surrogateescape").decode(errors="replace")
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    "options",
    [
        *(("--temperature", value) for value in ("0", "-1", "nan", "inf", "-inf")),
        *(("--seed", value) for value in ("-1", "99999999999999999999")),
        ("--tokens", "0"),
    ],
)
def test_options_out_of_range_are_refused(padded, monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["sample.py", str(padded), "To be", *options])
    with pytest.raises(SystemExit) as stop:
        sample.main()
    assert stop.value.code == 2 and "sample.py: error: " in capsys.readouterr().err


class Favouring:
    """A model with one logit for its favourite tokens, and another one for the rest."""

    def __init__(self, vocab_size: int, favourites: list[int], logit: float = 0.0):
        self.config = SimpleNamespace(vocab_size=vocab_size, context=8)
        self.favourites, self.logit = favourites, logit

    def __call__(self, text):
        logits = torch.full((*text.shape, self.config.vocab_size), -100.0)
        logits[..., self.favourites] = self.logit
        return logits


@pytest.mark.parametrize(
    ("vocabulary", "room", "last"), [(256, 384, 255), (128, 128, 127), (50257, 50304, 50256)]
)
def test_only_tokens_that_the_data_has_are_drawn(gpt2_vocabulary, vocabulary, room, last):
    coder, tokens = sample.coder_of(vocabulary)
    model = Favouring(room, [last, *range(vocabulary, room)])
    drawn = generate(model, [0], 20, 1.0, torch.Generator().manual_seed(0), tokens)
    assert drawn == [last] * 20 and coder.decode(drawn)


def test_a_padded_vocabulary_of_data_has_gpt2s_tokens(gpt2_vocabulary):
    assert sample.coder_of(50304)[1] == 50257


def test_other_vocabularies_and_prompts_are_refused():
    with pytest.raises(RunError, match="vocab_size=1000 of this run is neither that of bytes, up"):
        sample.coder_of(1000)
    letters = sample.Bytes().encode_ordinary("é")
    for prompt in (letters, [], [-1], [128]):
        with pytest.raises(RunError, match="give at least one, each from 0 to 127"):
            generate(Favouring(128, [65]), prompt, 1, 1.0, torch.Generator(), 128)
    with pytest.raises(RunError, match="logits are not finite"):
        generate(Favouring(128, [65], torch.nan), [0], 1, 1.0, torch.Generator())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is not a run"),
        (lambda path: (path / "config.yaml").write_text("model: {}"), "has no checkpoint"),
    ],
)
def test_a_directory_without_a_model_is_refused(tmp_path, prepare, message):
    prepare(tmp_path)
    result = script("sample.py", tmp_path, "x", expect=1)
    assert message in result.stderr and "Traceback" not in result.stderr


def test_the_log_becomes_a_wandb_run(run, tmp_path):
    script("scripts/to_wandb.py", run, "--mode", "offline")
    (mirror,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"test_loss" in mirror.read_bytes()
    steps = dict(history(read_log(run / "metrics.jsonl")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last_eval,) = [line for line in lines if line["record"] == "eval" and line["step"] == 4]
    (last_train,) = [line for line in lines if line["record"] == "train" and line["step"] == 4]
    assert steps[4]["test_loss"] == last_eval["test_loss"]
    assert steps[4]["loss"] == last_train["loss"]
    missing = script("scripts/to_wandb.py", tmp_path, "--mode", "offline", expect=1)
    assert "does not exist" in missing.stderr
