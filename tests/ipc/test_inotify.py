"""`Watch`: what happens in directories and trees, rename pairs, overflow, tasks, threads, limits."""

from __future__ import annotations

import asyncio
import os
import pickle
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path

import pytest
from ipc_children import run

from anywire.ipc import FileEvent, Watch


def told(watch: Watch, last: str, timeout: float = 20) -> list[tuple[str, str]]:
    """(kind, name below the watch) of all events until one on the file named `last`, which is made here."""
    open(os.path.join(watch.path, last), "w").close()
    found = []
    while True:
        event = watch.recv(timeout=timeout)
        name = os.path.relpath(event.path, watch.path)
        if name == last:
            return found
        found.append((event.kind, name))


def test_what_happens_in_a_directory(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        with pytest.raises(BlockingIOError):
            watch.try_recv()
        with pytest.raises(TimeoutError, match="nothing happened"):
            watch.recv(timeout=0.01)
        file = tmp_path / "file"
        file.write_text("x")
        (tmp_path / "directory").mkdir()
        (tmp_path / "directory" / "below").touch()          # not told
        file.unlink()
        assert told(watch, "last") == [
            ("created", "file"), ("modified", "file"), ("closed", "file"), ("created", "directory"),
            ("deleted", "file"),
        ]


def test_only_what_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with Watch(tmp_path, ("attributes", "created")) as watch:
        file.write_text("x")
        file.chmod(0o600)
        assert told(watch, "last") == [("attributes", "file")]
    with Watch(file, ("opened", "read", "closed", "deleted")) as watch:     # a file by itself
        file.read_text()
        file.unlink()
        assert [watch.recv(timeout=20)[:2] for _ in range(3)] == [
            ("opened", str(file)), ("read", str(file)), ("deleted", str(file)),
        ]
    wrong: list[Collection[str]] = [("created", "dogs"), "created"]
    for kinds in wrong:
        with pytest.raises(ValueError, match="the kinds are created, deleted"):
            Watch(tmp_path, kinds)


@pytest.mark.parametrize("front", ["blocking", "async"])
def test_renames_are_one_event(tmp_path: Path, front: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "a").touch()
    with Watch(inside, ("moved",)) as watch:
        def recv() -> FileEvent:
            return watch.recv(timeout=20) if front == "blocking" else asyncio.run(watch.recv_async(timeout=20))

        (inside / "a").rename(inside / "b")
        assert recv() == ("moved", str(inside / "b"), str(inside / "a"), False)
        (inside / "b").rename(outside / "c")                # its second half never comes
        assert recv() == ("moved_out", str(inside / "b"), None, False)
        (outside / "c").rename(inside / "d")
        assert recv() == ("moved_in", str(inside / "d"), None, False)
        inside.rename(tmp_path / "elsewhere")
        assert recv()[:2] == ("moved_out", str(inside))


def test_a_tree_is_followed(tmp_path: Path) -> None:
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("/")
    with Watch(tmp_path, ("created", "moved", "deleted"), recursive=True) as watch:
        (tmp_path / "old" / "deep" / "file").touch()
        (tmp_path / "new").mkdir()
        assert told(watch, "1") == [("created", "old/deep/file"), ("created", "new")]
        (tmp_path / "new" / "file").touch()
        (tmp_path / "old").rename(tmp_path / "new" / "moved")
        (tmp_path / "new" / "moved" / "deep" / "more").touch()
        assert told(watch, "2") == [
            ("created", "new/file"), ("moved", "new/moved"), ("created", "new/moved/deep/more"),
        ]
        (tmp_path / "new" / "file").unlink()
        assert told(watch, "3") == [("deleted", "new/file")]
        assert watch.unwatched == []


def test_what_is_made_before_its_directory_is_watched_is_told(tmp_path: Path) -> None:
    with Watch(tmp_path, ("created",), recursive=True) as watch:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "file").touch()
        assert {name for _, name in told(watch, "last")} == {"a", "a/b", "a/b/file"}


def test_a_tree_that_leaves_is_watched_no_more(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "tree" / "deep").mkdir(parents=True)
    outside.mkdir()
    with Watch(inside, ("created", "moved"), recursive=True) as watch:
        (inside / "tree").rename(outside / "tree")
        assert watch.recv(timeout=20)[:2] == ("moved_out", str(inside / "tree"))
        (outside / "tree" / "deep" / "file").touch()
        assert told(watch, "last") == []


def test_the_end_of_the_watched_directory_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    with Watch(directory) as watch:
        directory.rmdir()
        assert watch.recv(timeout=20)[:2] == ("deleted", str(directory))


def test_overflow_is_told(tmp_path: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Watch(tmp_path, ("attributes",)) as watch:
        first, second = tmp_path / "a", tmp_path / "b"
        first.touch()
        second.touch()
        for _ in range(most // 2 + 10):                     # two files in turn: equal neighbours would be merged
            os.utime(first)
            os.utime(second)
        kinds = set()
        while "overflow" not in kinds:
            event = watch.recv(timeout=20)
            kinds.add(event.kind)
        assert event == ("overflow", str(tmp_path), None, True)
        os.utime(first)
        assert watch.recv(timeout=20).kind == "attributes"  # it goes on


def test_tasks_and_threads_wait(tmp_path: Path) -> None:
    async def main() -> None:
        with Watch(tmp_path, ("created",)) as watch:
            lost = asyncio.create_task(watch.recv_async())
            await asyncio.sleep(0)
            lost.cancel()
            with pytest.raises(TimeoutError):
                await watch.recv_async(timeout=0.01)
            waiting = asyncio.create_task(watch.recv_async())
            await asyncio.sleep(0)
            (tmp_path / "one").touch()
            assert (await waiting).path == str(tmp_path / "one")
            (tmp_path / "two").touch()
            async for event in watch:
                assert event.path == str(tmp_path / "two")
                break

    asyncio.run(main())
    with Watch(tmp_path, ("created",)) as watch:
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(watch.recv().path)) for _ in range(8)]
        for thread in threads:
            thread.start()
        names = [str(tmp_path / f"t{number}") for number in range(8)]
        for name in names:
            open(name, "w").close()
        for thread in threads:
            thread.join()
        assert sorted(found) == names


@pytest.mark.processes
def test_errors_name_the_file_and_the_limit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Watch(tmp_path / "no")
    assert caught.value.filename == str(tmp_path / "no")
    assert run("""
        from anywire.ipc import Watch
        made = []
        try:
            while True:
                made.append(Watch("/"))
        except OSError as error:
            print("max_user_instances" in error.strerror)
        for watch in made:
            watch.close()
    """, user=64998) == "True\n"


@pytest.mark.processes
def test_directories_that_may_not_be_read_are_listed() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        os.mkdir(directory + "/closed", 0o700)
        os.mkdir(directory + "/open", 0o755)
        assert run("""
            import os, sys
            from anywire.ipc import Watch
            with Watch(sys.argv[1], recursive=True) as watch:
                print([os.path.basename(path) for path in set(watch.unwatched)])
        """, directory, user=65534) == "['closed']\n"


@pytest.mark.processes
def test_pickle_is_refused_fork_shares_and_dropping_warns(tmp_path: Path) -> None:
    made = [Watch(tmp_path)]
    with pytest.raises(TypeError, match="make one of"):
        pickle.dumps(made[0])
    with pytest.warns(ResourceWarning, match="never closed"):
        made.clear()
    assert run("""
        import os, sys
        from anywire.ipc import Watch
        with Watch(sys.argv[1], ("created",)) as watch:
            child = os.fork()
            if not child:
                open(sys.argv[1] + "/x", "w").close()
                os._exit(watch.recv(timeout=20).path.endswith("/x"))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            try:
                watch.try_recv()                        # the child took it
            except BlockingIOError:
                print("shared")
    """, str(tmp_path)) == "1\nshared\n"
