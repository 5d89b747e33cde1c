"""One writer at a time: one lock per store, however it is spelled, that nobody else's file is taken for."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import kills
import pytest
import tiny

import prep
from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import create_store, open_store
from prep.store.lock import writer_lock
from prep.store.transfer import pull


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text, and a store of both."""
    made = tiny.sources(tmp_path_factory.mktemp("made"))
    made.store = made.path / "prep.zarr"
    prep.covariance(made.model, made.data, store=made.store, **tiny.RUN)
    return made


def test_every_spelling_of_a_store_is_one_lock(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("s")
    (tmp_path / "folder" / "far").symlink_to(tmp_path / "link")
    spellings = [tmp_path / "link", tmp_path / "folder" / "far", f"{tmp_path}/./folder/../s/", f"file://{tmp_path}/s"]
    with writer_lock(tmp_path / "s"), contextlib.chdir(tmp_path):
        for other in [*spellings, "s", "./link/"]:
            with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on"), writer_lock(other):
                pass
    for one in spellings:
        with writer_lock(one):
            assert (tmp_path / "s.lock").exists()
            with pytest.raises(StoreError, match="is being written"), writer_lock(tmp_path / "s"):
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "s"]


def test_two_writers_through_a_link(made, tmp_path):
    """While one writes through a link no other does; then its basis comes beside the first one's."""
    pull(made.store, tmp_path / "s")
    (tmp_path / "link").symlink_to("s")
    options = {"store": tmp_path / "link", "name": "one", "rank": 4}
    process = kills.start(kills.decompose, options, 0.1, tmp_path / "said")
    while process.is_alive() and not (tmp_path / "said.work").exists():
        time.sleep(0.005)
    refused = rf"is being written by process {process.pid} on"
    with pytest.raises(StoreError, match=refused):
        prep.decompose(tmp_path / "s", name="two", rank=4, quiet=True)
    with pytest.raises(StoreError, match=refused):
        prep.covariance(made.model, made.data, store=tmp_path / "s", overwrite=True, **tiny.RUN)
    process.join()
    assert process.exitcode == 0
    prep.decompose(tmp_path / "s", name="two", rank=4, quiet=True)
    assert list(open_store(tmp_path / "s").bases) == ["one", "two"]
    assert verify(tmp_path / "s").findings == []


def _hold(path: str, ready: str) -> None:
    with writer_lock(path):
        open(ready, "w").close()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = kills.CONTEXT.Process(target=_hold, args=(str(tmp_path / "s"), str(tmp_path / "ready")))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.005)
    with pytest.raises(StoreError, match=rf"by process {process.pid} on \S+ for \d+ s"), writer_lock(tmp_path / "s"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with writer_lock(tmp_path / "s"):
        pass
    assert not (tmp_path / "s.lock").exists()


def _hammer(path: str, inside: str, turns: int) -> None:
    """Take the lock again and again; a file that only one process can make says that nobody else is inside."""
    done = 0
    while done < turns:
        with contextlib.suppress(StoreError), writer_lock(path):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            os.unlink(inside)
            done += 1


def test_two_processes_never_hold_it_both(tmp_path):
    arguments = (str(tmp_path / "s"), str(tmp_path / "inside"), 300)
    processes = [kills.CONTEXT.Process(target=_hammer, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_broken_is_not_given_up_twice(tmp_path):
    """The owner whose lock was taken leaves that of the next one alone."""
    with contextlib.ExitStack() as second:
        with writer_lock(tmp_path / "s"):
            second.enter_context(writer_lock(tmp_path / "s", break_lock=True))
        with pytest.raises(StoreError, match="is being written"), writer_lock(tmp_path / "s"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("break_lock", [False, True])
def test_a_strangers_file_is_not_taken_for_a_lock(tmp_path, break_lock):
    for name, text in (("poetry", "[metadata]\n"), ("x", "1"), ("list", "[1]"), ("other", '{"pid": 1}')):
        file = tmp_path / f"{name}.lock"
        file.write_text(text)
        with (
            pytest.raises(StoreError, match=rf"{name}.lock is not a lock"),
            writer_lock(tmp_path / name, break_lock),
        ):
            pass
        assert file.read_text() == text
    (tmp_path / "precious").write_text("x")
    (tmp_path / "s.lock").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe.lock")
    (tmp_path / "folder.lock").mkdir()
    for name in ("s", "pipe", "folder"):
        with pytest.raises(StoreError, match=r"cannot write beside|is not a lock"), writer_lock(tmp_path / name):
            pass
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.stress  # test_platforms.py hides more from all modules
def test_the_lock_module_needs_no_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import prep.store.lock, prep.store.transfer, prep.store.pool"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Places where no store can be


def places(path):
    """Locations that cannot be a store, by what is said of them."""
    (path / "file").write_text("x")
    (path / "broken").symlink_to("nowhere")
    (path / "loop").symlink_to("loop")
    return {
        "file and not a prep store": path / "file",
        "Not a directory": path / "file" / "s",
        "broken is a link that leads nowhere": path / "broken",
        "broken is a link that leads nowhere: make what it names": path / "broken" / "s",
        "loop is a link that leads nowhere": path / "loop",
        "File name too long": path / ("x" * 300),
        "File name too long|Filename too long": f"file://{path}/{'é' * 200}",
        "null": f"{path}/a\0b",
        "cannot be a store: name a directory below": "/",
        "names the host": "file://elsewhere/prep.zarr",
    }


def writing(location):
    with writer_lock(location):
        pass


@pytest.mark.parametrize(
    "use", [writing, lambda location: create_store(location, {}), lambda location: open_store(location, "r+")]
)
def test_what_cannot_be_a_store_is_refused_in_one_line(tmp_path, use):
    for said, location in places(tmp_path).items():
        with pytest.raises(StoreError, match=said) as caught:
            use(location)
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file", "loop"]


def test_reading_there_ends_in_one_line(tmp_path):
    for location in places(tmp_path).values():
        with pytest.raises(StoreError) as caught:
            open_store(location)
        assert len(str(caught.value).splitlines()) == 1


def test_a_name_with_no_room_for_the_locks_ending(tmp_path):
    with (
        pytest.raises(StoreError, match=r"cannot write beside .*File name too long"),
        writer_lock(tmp_path / ("x" * 253)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_store_through_a_link(made, tmp_path):
    """A link to a directory is the store that it leads to: made, written to and replaced there."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    pull(made.store, tmp_path / "link")
    prep.decompose(tmp_path / "link", rank=4, quiet=True)
    assert list(open_store(tmp_path / "disk" / "real").bases) == ["full"]
    pull(made.store, tmp_path / "link", overwrite=True)
    assert list(open_store(tmp_path / "disk" / "real").bases) == []
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
