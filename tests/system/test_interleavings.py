"""Random histories of one calibration: started, killed, changed, moved, started again. It ends right or in one line."""

import random
import shutil
from functools import cache
from pathlib import Path

import jobs
import kills
import pytest
import tiny
import torch

import prep
from prep.preprocess.verify import verify
from prep.store import open_store

SEQUENCES = 14
CHOICES = {
    "memory_budget": [60_000, 140_000, 10**9],
    "batch_size": [2, 2, 2, 3],
    "dtype": ["auto", "auto", "float32", "bfloat16"],
    "checkpoint_every": [0.0, 0.0, 0.05, 60.0],
    "overwrite": [False, False, False, True],
    "weights": [0, 0, 0, 1],
    "data": [0, 0, 0, 1],
    "threads": [1, 1, 2],
    "ranks": [1, 1, 1, 1, 1, 2],
    "place": ["a", "a", "b"],
}
BITWISE = ("threads", "ranks")  # what changes the order of float32 sums, and of the model's own


class History:
    """A model and text whose contents change in place, and a store that several commands have a hand in."""

    def __init__(self, made: Path, folder: Path, seed: int):
        self.made, self.folder, self.draw = made, folder, random.Random(seed)
        self.state = {name: values[0] for name, values in CHOICES.items()}
        self.used: dict[str, set] = {name: set() for name in BITWISE}
        self.starts, self.place = 0, "a"
        shutil.copytree(made / "model0", folder / "model")

    @property
    def store(self) -> Path:
        return self.folder / f"store-{self.place}"

    def change(self) -> None:
        for name, values in CHOICES.items():
            if self.draw.random() < 0.2:
                self.state[name] = self.draw.choice(values)

    def start(self, batches: int | None) -> tuple[int, str]:
        """Exit code and errors of a command with the present options, killed after so many batches."""
        state = self.state
        for kind in ("weights", "data"):
            source, target = self.files(kind)
            if target.exists() and target.read_bytes() == source.read_bytes():
                continue
            shutil.copyfile(source, target)
        if state["place"] != self.place:
            before, self.place = self.store, state["place"]
            if before.exists():
                before.rename(self.store)
            if before.with_name(f"{before.name}.staged").exists():
                before.with_name(f"{before.name}.staged").rename(self.store.with_name(f"{self.store.name}.staged"))
        options = {name: state[name] for name in ("memory_budget", "batch_size", "dtype", "checkpoint_every")}
        options |= {"model": str(self.folder / "model"), "data": str(self.folder / "text.jsonl"), "store": self.store}
        options |= {"num_sequences": SEQUENCES, "seq_len": 16, "quiet": True, "overwrite": state["overwrite"]}
        self.starts += 1
        for name in BITWISE:
            self.used[name].add(state[name])
        if state["ranks"] > 1:
            die = None if batches is None else (self.draw.randrange(2), max(1, batches // 2))
            codes, said, _ = jobs.run("covariance", options, self.folder, state["ranks"], die=die)
            lines = [line for text in said for line in text.splitlines()]
            code = max(codes) if batches is None or max(codes) == 0 else -9
            return code, "\n".join(lines)
        said = self.folder / f"said{self.starts}"
        process = kills.CONTEXT.Process(target=kills.cut_short, args=(options, state["threads"], batches, str(said)))
        process.start()
        process.join()
        return process.exitcode, said.read_text()

    def files(self, kind: str) -> tuple[Path, Path]:
        version = self.state[kind]
        if kind == "weights":
            return self.made / f"model{version}" / "model.safetensors", self.folder / "model" / "model.safetensors"
        return self.made / f"text{version}.jsonl", self.folder / "text.jsonl"

    def check(self, code: int, said: str) -> None:
        """The store is that of an uninterrupted run with the present options, or one line says why there is none."""
        what = (self.state, code, said)
        if code == -9:
            return
        assert code in (0, 2), what
        if code == 2:
            assert said.startswith("Error: ") and len(said.splitlines()) == 1, what
            return
        key = tuple(self.state[name] for name in ("weights", "data", "dtype", "batch_size"))
        wanted, moments = open_store(reference(self.made, *key)).moments, open_store(self.store).moments
        assert moments.sites == wanted.sites, what
        exact = all(used == {1} for used in self.used.values())
        for layer in wanted:
            ours, theirs = moments[layer], wanted[layer]
            assert ours.count == theirs.count and ours.members == theirs.members, what
            if exact:
                assert torch.equal(ours.second_moment, theirs.second_moment), (layer, what)
            else:
                error = tiny.relative(ours.second_moment, theirs.second_moment.numpy())
                assert error < (1e-2 if self.state["dtype"] == "bfloat16" else 1e-5), (layer, what)
        assert verify(self.store, model=str(self.folder / "model")).findings == [], what


@cache
def reference(made: Path, weights: int, data: int, dtype: str, batch_size: int) -> Path:
    """The store of a run that nothing interrupts."""
    store = made / f"reference-{weights}-{data}-{dtype}-{batch_size}"
    options = {"num_sequences": SEQUENCES, "seq_len": 16, "batch_size": batch_size, "dtype": dtype, "quiet": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prep.covariance(str(made / f"model{weights}"), str(made / f"text{data}.jsonl"), store=store, **options)
    finally:
        torch.set_num_threads(threads)
    return store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    for version in (0, 1):
        tiny.save(tiny.llama(seed=version), path / f"model{version}")
        tiny.write_data(path / f"text{version}.jsonl", tiny.texts(80, seed=version))
    return path


def live(made: Path, folder: Path, seed: int, starts: tuple[int, int] = (2, 5)) -> int:
    """One history; how often a command was ended before its time."""
    folder.mkdir()
    history, killed = History(made, folder, seed), 0
    for _ in range(history.draw.randint(*starts)):
        code, said = history.start(history.draw.choice([1, 2, 3, 5, 8, 13, None]))
        history.check(code, said)
        killed += code == -9
        history.change()
    code, said = history.start(None)
    history.check(code, said)
    if code != 0:
        history.state["overwrite"] = True
        code, said = history.start(None)
        assert code == 0, (history.state, said)
        history.check(code, said)
    left = [open_store(path).status for path in folder.glob("store-*.staged")]  # of a replacement given up
    assert set(left) <= {"incomplete"} and not list(folder.glob("*.replaced")), seed
    return killed


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(5, 20))])
def test_a_calibration_with_a_history(made, tmp_path, seed):
    live(made, tmp_path / "h", seed, (1, 3))


@pytest.mark.stress
def test_200_histories(made, tmp_path):
    assert sum(live(made, tmp_path / f"h{seed}", seed) for seed in range(1000, 1200)) > 100
