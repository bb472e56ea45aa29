"""The demo: its tasks are what they claim, it learns them, and it can be stopped and resumed."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import accumulate, chain, pairwise, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot

from flashrnn.__main__ import main
from flashrnn.cells import resolve
from flashrnn.demo import checkpoint, figure, language, state_tracking
from flashrnn.demo.automata import AUTOMATA, Automaton
from flashrnn.demo.distributed import World, join
from flashrnn.demo.errors import DemoError
from flashrnn.demo.model import FORGET_BIAS, RecurrentLayer, RecurrentNetwork
from tests.problems import BUILT_IN

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


# Tasks


def parity_by_hand(words):
    return list(accumulate((int(word) for word in words), lambda a, b: (a + b) % 2))


def mod_by_hand(words):
    """Python's own arithmetic, on the digits and operators as they are written."""
    return list(accumulate(words, lambda value, word: eval(f"({value}){word}") % 5, initial=0))[1:]


def s5_by_hand(words):
    """Five cards change places; a state is named by its place in the dictionary of all orders."""
    order, orders = "01234", ["".join(cards) for cards in permutations("01234")]
    visited = []
    for word in words:
        order = "".join(word[int(card)] for card in order)
        visited.append(orders.index(order))
    return visited


@pytest.mark.parametrize(
    ("task", "by_hand"), [("parity", parity_by_hand), ("mod", mod_by_hand), ("s5", s5_by_hand)]
)
@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 30), seed=st.integers(0, 2**31 - 1))
def test_automata_equal_their_definition(task, by_hand, B, T, seed):
    automaton = AUTOMATA[task]()
    tokens, states = automaton.sample(B, T, torch.Generator().manual_seed(seed))
    assert tokens.shape == states.shape == (B, T)
    for stream, visited in zip(tokens.tolist(), states.tolist(), strict=True):
        assert by_hand([automaton.tokens[token] for token in stream]) == visited


@pytest.mark.parametrize("task", AUTOMATA)
def test_every_state_is_reached_and_every_token_drawn(task):
    automaton = AUTOMATA[task]()
    tokens, states = automaton.sample(64, 256, torch.Generator().manual_seed(0))
    assert set(tokens.unique().tolist()) == set(range(len(automaton.tokens)))
    assert set(states.unique().tolist()) == set(range(len(automaton.table)))


# The network


@pytest.mark.parametrize("function", BUILT_IN)
@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 7), layers=st.integers(1, 3))
def test_network_goes_on_from_its_states(function, cut, layers):
    torch.manual_seed(0)
    network = RecurrentNetwork(5, 3, layers, function, N=2, D=4, dtype="float64").double()
    tokens = torch.randint(5, (2, 7))
    whole, last = network(tokens)
    first, between = network(tokens[:, :cut])
    second, final = network(tokens[:, cut:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final, last)
    assert whole.shape == (2, 7, 3)


@pytest.mark.parametrize("function", BUILT_IN)
def test_only_a_forget_gate_starts_open(function):
    gates = resolve(function).gate_names("b")
    layer = RecurrentLayer(function, N=2, D=4)
    for name, bias in zip(gates, layer.b, strict=True):
        assert (bias == (FORGET_BIAS if name == "f" else 0)).all()


# State tracking


class Oracle(nn.Module):
    """Gives the automaton's own states as logits, or always the wrong ones; notes the lengths."""

    def __init__(self, automaton, right):
        super().__init__()
        self.automaton, self.right, self.lengths = automaton, right, []
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, tokens, states=None):
        self.lengths.append(tokens.shape[1])
        logits = one_hot(self.automaton.run(tokens), len(self.automaton.table)).float()
        return self.scale * (logits if self.right else -logits), None


def test_curriculum_grows_to_the_longest_length_and_settles_there():
    oracle = Oracle(AUTOMATA["parity"](), right=True)
    schedule = state_tracking.Schedule(1000, 4, 1e-3, mastered=1.0, settle=30)
    trained = state_tracking.train(oracle, oracle.automaton, schedule, 0, ALONE)
    assert trained.steps == len(oracle.lengths) < 1000
    assert trained.mastered == max(oracle.lengths) == state_tracking.LONGEST
    assert min(oracle.lengths) == state_tracking.SHORTEST
    # Never more than one longer than what has been mastered.
    longest = list(accumulate(oracle.lengths, max))
    assert all(b - a <= 1 for a, b in pairwise(longest))
    assert longest.count(state_tracking.LONGEST) >= 30
    accuracy = state_tracking.test(oracle, oracle.automaton, 0, ALONE)
    assert accuracy == dict.fromkeys(state_tracking.TEST_LENGTHS, 1.0)
    assert "\nReached: at least 99% at length 256" in state_tracking.report(trained, 1, accuracy)


def test_a_network_that_learns_nothing_gets_no_longer_sequences_and_is_told_so():
    oracle = Oracle(AUTOMATA["parity"](), right=False)
    schedule = state_tracking.Schedule(20, 4, 1e-3, mastered=0.5, settle=5)
    trained = state_tracking.train(oracle, oracle.automaton, schedule, 0, ALONE)
    assert trained == state_tracking.Trained(steps=20, mastered=0)
    assert set(oracle.lengths) == {state_tracking.SHORTEST}
    report = state_tracking.report(trained, 1, {40: 0.1, 256: 0.0})
    assert "not even length 3" in report and "Not reached: at least 99%" in report


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_sequences_of_training_and_test_differ(seed, monkeypatch):
    sample, seeds = Automaton.sample, []

    def noted(automaton, B, T, generator):
        seeds.append(generator.initial_seed() % 2**32)  # What the generator makes of it.
        return sample(automaton, B, T, generator)

    monkeypatch.setattr(Automaton, "sample", noted)
    oracle = Oracle(AUTOMATA["parity"](), right=True)
    schedule = state_tracking.Schedule(1, 4, 1e-3, mastered=1.0, settle=1)
    state_tracking.train(oracle, oracle.automaton, schedule, seed, ALONE)
    state_tracking.test(oracle, oracle.automaton, seed, ALONE, lengths=(40,))
    assert len(set(seeds)) == 2


@given(total=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_cover_the_batch_once(total, size):
    rows = [*range(total)]
    shares = [rows[World(rank, size, ALONE.device).share(total)] for rank in range(size)]
    assert [*chain(*shares)] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_on_the_cpu_computes_with_one_thread_and_leaves_the_rest_as_they_were():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with join("cpu") as world:
            assert torch.get_num_threads() == 1
            assert world == ALONE
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Text


def test_python_brings_enough_english():
    text = language.python_reference()
    assert len(text) > 300_000
    assert 'The "if" statement is used for conditional execution' in text


@given(st.text("abc \n", min_size=200, max_size=400), st.integers(0, 2**31))
def test_corpus_keeps_the_end_of_the_text_from_training(text, seed):
    corpus = language.Corpus.of(text, shortest=11)
    parts = [*corpus.training.tolist(), *corpus.held_out.tolist()]
    assert "".join(corpus.characters[k] for k in parts) == text
    assert len(corpus.held_out) == len(text) // 10
    windows = corpus.windows(5, 10, torch.Generator().manual_seed(seed))
    assert windows.shape == (5, 11)
    for window in windows.tolist():
        assert "".join(corpus.characters[k] for k in window) in text[: len(corpus.training)]


def test_bits_per_character_of_a_model_that_knows_nothing():
    """They are log2 of the number of characters, whichever process reads which stream."""
    corpus = language.Corpus.of("abcdefgh" * 500, shortest=10)
    network = RecurrentNetwork(8, 8, 1, "elman", N=1, D=2)
    nn.init.zeros_(network.output.weight), nn.init.zeros_(network.output.bias)
    bits = language.bits_per_character(network, corpus.held_out, ALONE)
    assert bits == pytest.approx(3.0, abs=1e-6)


SCHEDULE = language.Schedule(steps=12, batch=4, length=8, learning_rate=1e-2, evaluate=5)
TEXT = "She sells sea shells by the sea shore. " * 20


def train_on_text(path, corpus, schedule=SCHEDULE):
    torch.manual_seed(3)
    count = len(corpus.characters)
    network = RecurrentNetwork(count, count, 2, "slstm", N=2, D=4)
    trained = language.train(network, corpus, schedule, 3, ALONE, path, settings={})
    return trained, network.state_dict()


@pytest.mark.parametrize("stop_at", [5, 7, 12])
def test_a_stopped_training_goes_on_to_the_same_bits(stop_at, tmp_path, monkeypatch, capsys):
    """By Ctrl-C at a look at the held-out text, between two, and at the very end."""
    corpus = language.Corpus.of(TEXT, shortest=9)
    expected, parameters = train_on_text(tmp_path / "uninterrupted.pt", corpus)
    assert expected.finished and [step for step, *_ in expected.history] == [5, 10, 12]

    windows, calls = language.Corpus.windows, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return windows(*arguments)

    monkeypatch.setattr(language.Corpus, "windows", interrupted)
    stopped, _ = train_on_text(tmp_path / "stopped.pt", corpus)
    assert stopped.steps == len(calls) == stop_at
    assert stopped.finished == (stop_at == 12)
    resumed, found = train_on_text(tmp_path / "stopped.pt", corpus)
    assert f"Going on from step {stop_at} of 12" in capsys.readouterr().out
    assert len(calls) == 12
    assert resumed == expected
    assert all(torch.equal(found[name], parameters[name]) for name in parameters)


def test_bits_per_character_fall(tmp_path):
    schedule = language.Schedule(steps=60, batch=8, length=16, learning_rate=1e-2, evaluate=30)
    corpus = language.Corpus.of(TEXT, shortest=17)
    trained, _ = train_on_text(tmp_path / "a.pt", corpus, schedule)
    (_, _, first), (_, _, last) = trained.history
    assert last < first < math.log2(len(corpus.characters))
    assert language.report(trained).endswith(f"{last:.3f}")


# Checkpoints


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "a.pt"
    content = {"settings": {"seed": 1}, "step": 3, "model": {"w": torch.ones(2)}}
    checkpoint.save(path, content)
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"settings": {}, "cannot be pickled": lambda: None})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]
    found = checkpoint.load(path, {"seed": 1})
    assert found["step"] == 3 and torch.equal(found["model"]["w"], torch.ones(2))
    assert checkpoint.load(tmp_path / "b.pt", {}) is None


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"settings": {"seed": 1, "steps": 5, "text": "x"}})
    with pytest.raises(DemoError, match=r"\(seed 1 there, 2 now; steps 5 there, 6 now\)"):
        checkpoint.load(tmp_path / "a.pt", {"seed": 2, "steps": 6, "text": "x"})
    (tmp_path / "b.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DemoError, match=r"b\.pt is not a checkpoint of this demo.*--output"):
        checkpoint.load(tmp_path / "b.pt", {})


def refuse(monkeypatch, method, number, ending=".tmp"):
    """Make a method of paths fail, of the files alone that are written to be renamed, or others."""
    function = getattr(Path, method)

    def refused(path, *given, **named):
        if path.name.endswith(ending):
            raise OSError(number, os.strerror(number))
        return function(path, *given, **named)

    monkeypatch.setattr(Path, method, refused)


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_full_disk_is_told_and_keeps_what_was_there(tmp_path, monkeypatch, method):
    checkpoint.save(tmp_path / "a.pt", {"settings": {}, "step": 1})
    figure.draw(tmp_path / "a.png", "", "", "", [figure.Line("h", [0], [0])])
    before = (tmp_path / "a.png").read_bytes()
    refuse(monkeypatch, method, errno.ENOSPC)
    words = "could not be written: No space left on device; the one of before is as it was"
    with pytest.raises(DemoError, match=rf"a\.pt {words}"):
        checkpoint.save(tmp_path / "a.pt", {"settings": {}, "step": 2})
    with pytest.raises(DemoError, match=rf"a\.png {words}"):
        figure.draw(tmp_path / "a.png", "", "", "", [figure.Line("h", [0], [1])])
    with pytest.raises(DemoError, match=r"b\.pt could not be written: No space left on device$"):
        checkpoint.save(tmp_path / "b.pt", {"settings": {}, "step": 2})
    assert checkpoint.load(tmp_path / "a.pt", {})["step"] == 1
    assert (tmp_path / "a.png").read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pt", "a.png"}


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(DemoError, match=r"a\.pt cannot be read: Is a directory.*--output"):
        checkpoint.load(tmp_path / "a.pt", {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_and_their_handlers_come_back(number):
    before = signal.getsignal(number)
    with checkpoint.stop_on_signal() as stop:
        assert not stop.requested
        for _ in range(2):  # torchrun sends one, the terminal another.
            signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is before


# The command


def rows_of(printed):
    """The table of accuracy by length."""
    rows = re.findall(r"^ +(\d+) +([\d.]+)%$", printed, re.MULTILINE)
    return {int(length): float(right) for length, right in rows}


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_state_tracking_from_the_command_line(tmp_path, capsys):
    arguments = ["demo", "--device=cpu", "--steps=3", "--function=gru", "--dtype=bfloat16"]
    assert main([*arguments, f"--output={tmp_path / 'new' / 'folder'}"]) == 0
    printed, bar = capsys.readouterr()
    assert "Task parity" in printed and "gru" in printed
    assert tuple(rows_of(printed)) == state_tracking.TEST_LENGTHS
    assert "3/3" in bar and "length ≤ " in bar
    assert is_png(tmp_path / "new" / "folder" / "parity-gru.png")


def test_state_tracking_stops_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Automaton, "sample", interrupted)
    assert main(["demo", "--device=cpu", f"--output={tmp_path}"]) == 130
    assert capsys.readouterr().err.endswith("\nStopped.\n")


def test_text_from_the_command_line_and_its_resumption(tmp_path, capsys, monkeypatch):
    (tmp_path / "shells.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["demo", f"--text={tmp_path / 'shells.txt'}", "--steps=4", "--device=cpu"]
    arguments += ["--function=elman", f"--output={tmp_path}"]
    windows = language.Corpus.windows

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return windows(*given)

    with monkeypatch.context() as patch:
        patch.setattr(language.Corpus, "windows", interrupted)
        assert main(arguments) == 130
    assert "Stopped at step 1 of 4 and saved" in capsys.readouterr().out

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Going on from step 1 of 4" in printed
    assert len(printed.partition("A sample:\n\n")[2]) > language.SAMPLE_CHARACTERS
    assert is_png(tmp_path / "text-shells-elman.png")
    assert (tmp_path / "text-shells-elman.pt").exists()

    assert main([*arguments, "--seed=1"]) == 2
    assert "seed 0 there, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text=missing.txt"], "--text missing.txt: No such file or directory"),
        (["--text=."], "--text .: Is a directory"),
        (["--text=latin.txt"], "not UTF-8 text (invalid continuation byte at byte 1)"),
        (["--text=short.txt"], "a text of 10 characters is too short to learn from: 650"),
        (["--text=empty.txt"], "a text of 0 characters is too short to learn from: 650"),
        (["--text=picture.png"], "not UTF-8 text (invalid start byte at byte 0)"),
        (["--text=secret.txt"], "--text secret.txt: Permission denied"),
        (
            ["--text=short.txt", "--task=parity"],
            "--text goes with --task text, not with --task par",
        ),
        (["--device=tpu"], "--device tpu: this machine offers cpu and"),
        (["--device=cuda:99"], "--device cuda:99: this machine offers cpu and"),
        (["--device=meta"], "--device meta: this machine offers cpu and"),
        (["--device=hpu"], "--device hpu: this machine offers cpu and"),
        (["--device=xla"], "--device xla: this machine offers cpu and"),
        (["--backend=vanila", "--device=cpu"], "unknown backend 'vanila'. Did you mean 'vanilla'?"),
        (["--backend=triton", "--device=cpu"], "backend 'triton' cannot do this call: "),
        (["--output=short.txt"], "--output short.txt: File exists"),
        (["--output=short.txt/deeper"], "--output short.txt/deeper: Not a directory"),
        (["--output=taken"], "taken/parity-slstm.png is to be a file, and is a folder"),
        (["--output=taken", "--task=text"], "taken/text-slstm.pt is to be a file, and is a folder"),
        ([f"--text={'long' * 60}.txt"], "--output flashrnn-demo: File name too long"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "secret.txt").write_text(TEXT)
    refuse(monkeypatch, "read_text", errno.EACCES, "secret.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / f"{'long' * 60}.txt").write_text(TEXT)
    for name in ("parity-slstm.png", "text-slstm.pt"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "short.txt").write_text("ten chars.")
    assert main(["demo", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("flashrnn demo: ") and printed.count("\n") == 1
    assert words in printed


@pytest.mark.parametrize("task", ["parity", "text"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_nothing_is_told_before_the_training(
    number, task, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(RecurrentNetwork, "__init__", None)  # None may be made.
    refuse(monkeypatch, "write_bytes", number)
    assert main(["demo", "--device=cpu", f"--task={task}", f"--output={tmp_path}"]) == 2
    printed = capsys.readouterr().err
    assert printed == f"flashrnn demo: --output {tmp_path}: {os.strerror(number)}\n"


def test_a_disk_that_is_full_after_the_training_costs_the_figure_alone(
    tmp_path, monkeypatch, capsys
):
    def full(*given, **named):
        refuse(monkeypatch, "write_bytes", errno.ENOSPC)
        return {40: 1.0, 256: 1.0}

    monkeypatch.setattr(state_tracking, "test", full)
    assert main(["demo", "--device=cpu", "--steps=1", f"--output={tmp_path}"]) == 2
    printed, errors = capsys.readouterr()
    assert rows_of(printed) == {40: 100, 256: 100}
    assert errors.endswith("parity-slstm.png could not be written: No space left on device\n")


def test_a_python_without_its_reference_asks_for_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert main(["demo", "--device=cpu", "--task=text", f"--output={tmp_path}"]) == 2
    assert "came without its reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(x, marks=pytest.mark.slow) for x in ("latin-1", "cp1252"))]
)
def test_a_terminal_that_cannot_show_the_text_gets_what_it_can(encoding, tmp_path):
    (tmp_path / "grüße.txt").write_text("Ein Löffel ≤ zwei Löffel. " * 50, encoding="utf-8")
    command = [sys.executable, "-m", "flashrnn", "demo", "--device=cpu", "--steps=1"]
    command += ["--function=elman", "--text=grüße.txt", "--output=übung"]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "PYTHONUTF8": "1",  # of file names
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    name = "grüße.txt".encode(encoding, "backslashreplace")
    assert b"Text: " + name in done.stdout and b"A sample:" in done.stdout


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--task=partiy", "invalid choice: 'partiy'"),
        ("--function=lsmt", "invalid choice: 'lsmt'"),
        ("--dtype=int8", "invalid choice: 'int8'"),
        ("--steps=0", "'0' given; accepted are whole numbers from 1 on"),
        ("--steps=many", "'many' given; accepted are whole numbers from 1 on"),
        ("--seed=-1", "'-1' given; accepted are whole numbers from 0 to 2147483647"),
        ("--seed=2147483648", "accepted are whole numbers from 0 to 2147483647"),
    ],
)
def test_options_that_cannot_be(argument, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["demo", argument])
    assert leaving.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_packages_are_named_before_the_training(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--device=cpu"]) == 2
    printed = capsys.readouterr().err
    assert "needs matplotlib, which is not installed" in printed and "flashrnn-jit[demo]" in printed


@pytest.mark.slow
@pytest.mark.parametrize("function", ["slstm", "lstm"])
def test_the_default_demo_learns_parity(function, tmp_path, capsys):
    """At least 99% of sequences of length 256, within a minute on two cores."""
    begun = time.process_time()
    assert main(["demo", "--device=cpu", f"--function={function}", f"--output={tmp_path}"]) == 0
    assert time.process_time() - begun < 120
    printed = capsys.readouterr().out
    assert rows_of(printed)[256] >= 99
    assert "all lengths from 3 to 40" in printed and "Reached: at least 99%" in printed


@pytest.mark.slow
def test_two_processes_come_to_the_result_of_one(tmp_path):
    """Under torchrun, on the CPU with gloo: the same losses but for rounding, printed once; and
    each goes on from what the other saved."""
    (tmp_path / "shells.txt").write_text(TEXT * 2, encoding="utf-8")
    demo = ["-m", "flashrnn", "demo", "--device=cpu", "--steps=3", "--text=shells.txt"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(start, folder):
        command = [sys.executable, *start, *demo, f"--output={folder}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Bits per character:") == 1
        assert is_png(tmp_path / folder / "text-shells-slstm.png")
        return done.stdout, torch.load(tmp_path / folder / "text-shells-slstm.pt")["history"]

    printed, one = run([], "one")
    assert "processes" not in printed
    printed, two = run(torchrun, "two")
    assert "on cpu, 2 processes" in printed
    assert [step for step, *_ in one] == [3]
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0)
    printed, again = run(torchrun, "one")
    assert "Going on from step 3 of 3" in printed and again == one
