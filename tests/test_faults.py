"""What goes wrong in a run of one process: repeated crashes, NaN, lost and unreadable files, full disks, signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from deitfast.distributed import board, posted
from deitfast.engine.engine import FlatEngine
from deitfast.errors import DeitfastError, HopelessError
from deitfast.training import checkpoint, resume, saving
from deitfast.training.checkpoint import Checkpoint
from deitfast.training.environment import changes
from deitfast.training.faults import FaultLog
from deitfast.training.interrupt import Agreement, StopRequest
from deitfast.training.run_folder import Progress, Reached
from deitfast.training.saving import Saver
from deitfast.training.watch import Watch
from tests.faults.harness import assert_same, losses, reached, running, tensors_of, until_step
from tests.test_train import FULL, train_two_blocks, write_noise

RECIPE = replace(FULL, batch=16, micro_batch=8, epochs=2, save_minutes=0.0)
"""20 steps on 160 small images (`small_data`), a save after each, an evaluation at the end."""


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    global RECIPE
    RECIPE = replace(RECIPE, data=write_noise(tmp_path_factory.mktemp("data"), train=80, val=10))


def kinds(out: Path) -> list[str]:
    return [entry["kind"] for entry in FaultLog(out / "faults.jsonl").entries()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_two_blocks(replace(RECIPE, out=str(out)))
    return out


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> dict[int, object]:
    """step -> what happens in it: called with the engine before its step."""
    wanted: dict[int, object] = {}
    step = FlatEngine.__call__

    def broken(self, batches, number, lr):
        if number in wanted:
            wanted[number](self)  # type: ignore[operator]
        step(self, batches, number, lr)

    monkeypatch.setattr(FlatEngine, "__call__", broken)
    return wanted


def crash(_: object) -> None:
    raise RuntimeError("broken on purpose")


def test_the_third_crash_at_one_step_ends_it_and_names_the_cause(tmp_path: Path, breaks) -> None:
    recipe = replace(RECIPE, out=str(tmp_path))
    breaks[4] = crash
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            train_two_blocks(recipe)
    with pytest.raises(HopelessError, match=r"3 starts in a row ended in step 5, .* RuntimeError: broken on purpose"):
        train_two_blocks(recipe)
    assert kinds(tmp_path) == [*["error", "crash"] * 3, "refused"]
    with pytest.raises(RuntimeError):  # started again by hand, it tries again
        train_two_blocks(recipe)
    del breaks[4]
    assert train_two_blocks(recipe, stop_at=6) is None
    assert kinds(tmp_path)[-2:] == ["error", "crash"]
    assert not Progress(tmp_path / "progress.json").read().running  # type: ignore[union-attr]


def test_crashes_at_different_steps_and_mistakes_are_no_row(tmp_path: Path, breaks) -> None:
    recipe = replace(RECIPE, out=str(tmp_path))
    for step in (2, 3, 4, 5):
        breaks.clear()
        breaks[step] = crash
        with pytest.raises(RuntimeError):
            train_two_blocks(recipe)
    breaks.clear()
    for _ in range(4):
        with pytest.raises(DeitfastError, match="another recipe"):
            train_two_blocks(replace(recipe, lr=0.5))
    assert train_two_blocks(recipe, stop_at=6) is None
    assert kinds(tmp_path).count("crash") == 4


def test_ten_steps_of_nan_go_back_to_the_checkpoint_before_and_end_as_if_nothing_had_been(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    loss, seen = FlatEngine.loss, []

    def poisoned(self, inputs):
        value = loss(self, inputs)
        if self.poisoned and len(seen) < 2 * 10:  # micro-batches of ten steps
            seen.append(1)
            return value * float("nan")
        return value

    step = FlatEngine.__call__

    def noting(self, batches, number, lr):
        self.poisoned = number >= 7
        step(self, batches, number, lr)

    monkeypatch.setattr(FlatEngine, "loss", poisoned)
    monkeypatch.setattr(FlatEngine, "__call__", noting)
    train_two_blocks(replace(RECIPE, out=str(tmp_path)))  # which saves at every step
    said = capsys.readouterr().out
    assert "Going back to the checkpoint of step 7" in said
    assert kinds(tmp_path).count("roll-back") == 1
    assert_same(whole, tmp_path)


def test_nan_before_the_first_checkpoint_is_a_mistake_in_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = FlatEngine.loss
    monkeypatch.setattr(FlatEngine, "loss", lambda self, inputs: loss(self, inputs) * float("nan"))
    with pytest.raises(DeitfastError, match=r"Lower --lr.* There is no checkpoint of before") as error:
        train_two_blocks(replace(RECIPE, out=str(tmp_path), save_minutes=1e6))
    assert error.value.exit_code == 2


def test_nan_that_comes_again_ends_the_run_with_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = FlatEngine.loss
    train_two_blocks(replace(RECIPE, out=str(tmp_path / "later")), stop_at=3)
    monkeypatch.setattr(FlatEngine, "loss", lambda self, inputs: loss(self, inputs) * float("nan"))
    with pytest.raises(HopelessError, match="This is the second time") as error:
        train_two_blocks(replace(RECIPE, out=str(tmp_path / "later"), save_minutes=1e6))
    assert error.value.exit_code == 3
    assert kinds(tmp_path / "later").count("roll-back") == 1


@pytest.mark.parametrize("lost", ["emptied", "renamed"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_from_nothing(tmp_path: Path, whole: Path, lost: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    if lost == "emptied":
        shutil.rmtree(out / "ckpt")
    else:
        for path in (out / "ckpt").glob("step-*"):
            path.rename(path.with_name(f"old-{path.name}"))
    before = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "best/model.safetensors")}
    for _ in range(2):
        with pytest.raises(DeitfastError, match=r"no checkpoint is in .* Put its step-\* folders back, or .* --out"):
            train_two_blocks(replace(RECIPE, out=str(out)))
        assert {name: (out / name).read_bytes() for name in before} == before
        (out / "progress.json").unlink(missing_ok=True)  # as an older version left it


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path: Path, breaks) -> None:
    recipe = replace(RECIPE, out=str(tmp_path), save_minutes=1e6)
    breaks[3] = crash
    with pytest.raises(RuntimeError):
        train_two_blocks(recipe)
    breaks.clear()
    assert train_two_blocks(recipe, stop_at=5) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.json", b"", "recipe.json cannot be read"),
        ("recipe.json", b"[]", "recipe.json cannot be read"),
        ("recipe.json", b"[" * 200_000, "recipe.json cannot be read"),
        ("ckpt/latest", b"\xff" * 5000, ""),
        ("metrics.jsonl", b'{"step": "3"}\n\xff\xfe\n{"st', ""),
        ("env.json", b"[]", ""),
        ("progress.json", b"\x00\x01", ""),
        ("faults.jsonl", b'{"kind": 3}\n\xff\n[]\n{"kind"', ""),
    ],
)
def test_a_damaged_file_of_the_run_folder_is_one_line_or_none(
    tmp_path: Path, whole: Path, name, content, message
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / name).write_bytes(content)
    if message:
        with pytest.raises(DeitfastError, match=message) as error:
            train_two_blocks(replace(RECIPE, out=str(out)), eval_images=10)
        assert "\n" not in str(error.value)
        train_two_blocks(replace(RECIPE, out=str(out), allow_changes=True), eval_images=10)
    else:
        train_two_blocks(replace(RECIPE, out=str(out)), eval_images=10)


def test_a_lost_list_of_images_and_a_changed_environment_are_told(tmp_path: Path, whole: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "images.npz").unlink()
    facts = json.loads((out / "env.json").read_text())
    (out / "env.json").write_text(json.dumps(facts | {"torch": "2.0.0", "commit": "abc"}))
    train_two_blocks(replace(RECIPE, out=str(out)), eval_images=10)
    said = capsys.readouterr().out
    assert "images.npz is missing: nobody can tell whether" in said
    assert f"since the last start torch was 2.0.0, is {torch.__version__}" in said
    assert "since the last start commit was abc, is" in said
    assert json.loads((out / "env.json").read_text())["earlier"][-1]["torch"] == "2.0.0"


def test_only_what_changed_is_told_as_changed() -> None:
    facts = {"torch": "2", "gpu": {"name": "A"}, "commit": "a", "code": "1"}
    assert changes(facts, facts) == []
    assert changes({}, facts) == []
    assert changes(facts, facts | {"code": "2"}) == ["code was 1, is 2"]
    assert changes({"wire": "fp32"}, {"wire": "bf16"}) == ["wire was fp32, is bf16"]
    assert changes(facts, facts | {"gpu": {"name": "B"}, "commit": "b", "code": "2"}) == [
        "commit was a, is b", "gpu was A, is B",
    ]  # fmt: skip


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_while_costs_saves_and_nothing_else(
    tmp_path: Path, whole: Path, breaks, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write = checkpoint.write_hashes  # after the tensors, before anything is renamed
    monkeypatch.setattr(saving, "_RETRY_S", 0.0)
    breaks[4] = lambda _: monkeypatch.setattr(checkpoint, "write_hashes", no_space)
    breaks[9] = lambda _: monkeypatch.setattr(checkpoint, "write_hashes", write)
    train_two_blocks(replace(RECIPE, out=str(tmp_path)))
    said = capsys.readouterr().out
    assert "checkpoint of step 6 not written: [Errno 28] No space left on device (" in said
    assert "MiB free). Training goes on and tries again; step " in said
    assert 3 <= kinds(tmp_path).count("failed save") <= 5
    assert not list((tmp_path / "ckpt").glob(".tmp-*"))
    assert_same(whole, tmp_path)


def make_saver(folder: Path, told: list[str]) -> Saver:
    return Saver(folder, 0, told.append, lambda _: None, lambda *_: None)


def test_what_is_saved_is_the_state_at_that_moment(tmp_path: Path) -> None:
    saver, weights = make_saver(tmp_path, []), torch.zeros(1_000_000)
    state = {"best": None, "steps_per_epoch": 1}
    for step in (1, 2):
        weights.fill_(step)
        saver.save(step, {"model": {"w": weights}}, state)
        weights.fill_(-1)
    saver.join()
    for step in (1, 2):
        assert checkpoint.load(tmp_path / f"step-000000{step}").tensors["model"]["w"].eq(step).all()
    assert saver.saved == 2
    assert saver.stall > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_save_that_a_full_tmpfs_ends_is_told_and_leaves_nothing_and_the_next_one_with_space_succeeds(
    small_disk: Path,
) -> None:
    folder, filler, told = small_disk / "ckpt", small_disk / "filler", []
    saver, tensors = make_saver(folder, told), {"model": {"w": torch.ones(100_000)}}
    state = {"best": None, "steps_per_epoch": 1}
    saver.save(1, tensors, state)
    saver.join()
    filler.write_bytes(bytes(1_300_000))  # a fifth of a checkpoint is left
    saver.save(2, tensors, state)
    saver.join()
    assert len(told) == 1
    assert "No space left" in told[0]
    assert "Training goes on and tries again; step 1 is safe" in told[0]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-0000001"]
    filler.unlink()
    saver.save(3, tensors, state)
    saver.join()
    found = checkpoint.load_newest(folder, told.append)
    assert found is not None
    assert found.step == 3
    assert len(told) == 1


def test_a_run_that_cannot_save_for_long_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_hashes", no_space)
    told: list[str] = []
    saver = make_saver(tmp_path, told)
    tensors = {"model": {"w": torch.zeros(3)}}
    saver.save(1, tensors, {})
    saver.join()
    assert len(told) == 1
    monkeypatch.setattr(saving, "GIVE_UP_S", 0.0)
    saver.save(2, tensors, {})
    with pytest.raises(DeitfastError, match=r"no checkpoint could be written to .*No space left .* Free space"):
        saver.join()


def test_retention_keeps_the_newest_and_those_of_every_so_many_steps(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.zeros(3)}}
    for step in range(1, 12):
        checkpoint.save(tmp_path, Checkpoint(step, tensors, {}), keep_every=5)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:07d}" for s in (5, 10, 11)]


def test_retention_drops_nothing_while_the_new_one_does_not_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"model": {"w": torch.zeros(3)}}
    for step in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(step, tensors, {}))
    monkeypatch.setattr(checkpoint, "damage", lambda _: "model.safetensors sha256 mismatch")
    checkpoint.save(tmp_path, Checkpoint(3, tensors, {}))
    assert len(list(tmp_path.glob("step-*"))) == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_the_run_goes_on_bitwise(tmp_path: Path, whole: Path, breaks, capsys, name: str) -> None:
    def send(_: object) -> None:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.2)  # the thread that hears of it

    recipe = replace(RECIPE, out=str(tmp_path), save_minutes=1e6)
    breaks[7] = send
    with pytest.raises(SystemExit) as end:
        train_two_blocks(recipe)
    assert end.value.code == 75
    assert f"{name}: saved at step 8. The same command resumes" in capsys.readouterr().out
    breaks.clear()
    train_two_blocks(recipe)
    assert_same(whole, tmp_path)
    assert kinds(tmp_path) == []


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_and_the_launcher_starts_nothing_again(tmp_path: Path) -> None:
    with running(tmp_path / "run", processes=2, restarts=3, distillation="none", teacher=None, epochs=100) as run:
        until_step(run, 2)
        os.kill(run.workers()[1], signal.SIGTERM)
        assert run.wait() == 75, run.text()
        assert not run.workers()
    saved = reached(run.out)
    assert f"SIGTERM: saved at step {saved['step']}. The same command resumes" in run.text()
    assert (run.out / "ckpt" / "latest").read_text().strip() == f"step-{saved['step']:07d}"
    assert "resuming" not in run.text()
    assert kinds(run.out) == []


def test_a_signal_in_an_evaluation_is_followed_and_the_evaluation_comes_after_the_resume(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deitfast.use import evaluate

    tally = evaluate._tally

    def sending(heads, labels):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return tally(heads, labels)

    monkeypatch.setattr(evaluate, "_tally", sending)
    with pytest.raises(SystemExit):
        train_two_blocks(replace(RECIPE, out=str(tmp_path)))
    assert not (tmp_path / "best").exists()
    monkeypatch.setattr(evaluate, "_tally", tally)
    assert train_two_blocks(replace(RECIPE, out=str(tmp_path))) is not None
    assert_same(whole, tmp_path)
    best = [tensors_of(out / "best" / "model.safetensors") for out in (whole, tmp_path)]
    assert best[0] == best[1]
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, tmp_path)]
    scores = [[score for score in map(json.loads, one) if "top1" in score] for one in lines]
    assert scores[0] == scores[1]
    assert len(losses(tmp_path)) == 20


def test_a_run_that_reads_copies_of_its_data_is_the_same_run(tmp_path: Path, whole: Path, capsys) -> None:
    out, stage = tmp_path / "run", tmp_path / "stage"
    train_two_blocks(replace(RECIPE, out=str(out)), stop_at=4, stage=stage)
    train_two_blocks(replace(RECIPE, out=str(out)), stage=stage)
    assert_same(whole, out)
    assert "staged 180 of 180 files" in capsys.readouterr().out
    assert sorted(p.name for p in stage.rglob("*.png")) == sorted(p.name for p in Path(RECIPE.data).rglob("*.png"))
    with pytest.raises(DeitfastError, match=r"--stage .* lies in the data"):
        train_two_blocks(replace(RECIPE, out=str(tmp_path / "other")), stage=Path(RECIPE.data) / "train")


def test_a_second_signal_and_one_in_start_up_end_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deitfast.training import interrupt

    ended: list[int] = []
    monkeypatch.setattr(interrupt, "leave_now", lambda code, **_: ended.append(code))
    with StopRequest():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
    assert ended == [75]
    ended.clear()
    monkeypatch.setattr(interrupt, "_SAME_S", 0.3)
    with StopRequest() as stop:
        stop.begin()
        for pause in (0.05, 0.5, 0.1):  # the second belongs to the first: a launcher and a terminal pass one on
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)
        assert stop.received == "SIGINT"
    assert ended == [128 + signal.SIGINT]
    ended.clear()
    with StopRequest() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        stop.end()  # all is saved
        os.kill(os.getpid(), signal.SIGTERM)  # of a launcher whose other process was faster
        time.sleep(0.2)
    assert not ended
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("who", [0, 2])
def test_all_processes_stop_after_the_same_step(who: int) -> None:
    store = dist.HashStore()
    stopped: list[tuple[int, int, str]] = []

    def process(rank: int) -> None:
        stop = StopRequest()
        agreement = Agreement(stop, store, rank, 0)
        for step in range(1, 2000):
            time.sleep(0.002 if rank == 1 else 0.0005)
            if rank == who and step == 40:
                stop.received = "SIGTERM"
            if name := agreement.decided(step):
                stopped.append((rank, step, name))
                return

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stopped) == 3
    assert len({(step, name) for _, step, name in stopped}) == 1
    assert 40 <= stopped[0][1] < 40 + 3 * 32


def test_a_run_finds_no_message_of_the_run_before_it_on_the_same_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor after a roll-back: with old decisions one process stops for the next, which waits for it in a collective."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    before, now = board(), board()
    before.set("stop/0", "1 SIGTERM")
    assert posted(now, "stop/0") is None
    assert posted(before.clone(), "stop/0") == "1 SIGTERM"


def test_a_process_that_hangs_while_tensors_are_collected_has_no_more_patience_than_in_a_step() -> None:
    doing: list[str] = []
    watch = Watch(None, 0, 2, 5, patience=60.0, restarts=False, say=print, fault=print)

    def tensors() -> dict[str, dict[str, torch.Tensor]]:
        doing.append(watch.doing)
        return {}

    saver = SimpleNamespace(save=lambda *_: doing.append(watch.doing), join=lambda: None)
    run = SimpleNamespace(
        engine=SimpleNamespace(tensors=tensors), folder=True, saver=saver, step=6, recipe=RECIPE, best=None,
        train_data=SimpleNamespace(classes=()), order=SimpleNamespace(steps_per_epoch=1), evaluated=0,
    )  # fmt: skip
    watch.stepped(6)
    resume.save(run, watch, wait=True)
    watch.close()
    assert doing == ["a step", "a save"]


def test_the_leading_process_says_whom_all_wait_for_and_a_hanging_one_ends() -> None:
    board, said, faults, ended = dist.HashStore(), [], [], threading.Event()
    watches = [
        Watch(
            board, rank, 2, 5, patience=2.0, restarts=rank == 0, say=said.append, tell_after=0.4,
            fault=lambda *what: faults.append(what), leave=lambda code: ended.set(),
        )
        for rank in range(2)
    ]  # fmt: skip
    for step in (6, 7):
        for watch in watches:
            watch.stepped(step)
    watches[0].stepped(8)  # and waits for the other
    assert ended.wait(30)
    for watch in watches:
        watch.close()
    assert "after step 8: waiting for process 1 (step 7, in a step); process 0 is in a step" in said[0]
    assert [kind for kind, *_ in faults][-1] == "hang"
    assert "waiting" in [kind for kind, *_ in faults]


def test_a_pause_and_the_first_step_are_no_hang(tmp_path: Path) -> None:
    ended: list[int] = []
    watch = Watch(
        None, 0, 1, 0, patience=0.3, restarts=True, say=lambda _: None, fault=lambda *_: None, leave=ended.append
    )
    time.sleep(0.8)  # kernels compile
    watch.stepped(1)
    with watch.during("an evaluation"):
        for _ in range(8):
            time.sleep(0.1)
            watch.alive()
    watch.close()
    assert not ended


def test_steps_that_are_all_slow_are_no_news_and_one_process_waits_for_nobody() -> None:
    said, faults = [], []
    watch = Watch(
        None, 0, 1, 0, patience=60.0, restarts=True, say=said.append, fault=lambda *what: faults.append(what),
        tell_after=0.2,
    )  # fmt: skip
    watch.stepped(1)
    with watch.during("an evaluation"):
        pass
    watch._alive -= 100.0  # as if the step after it had taken so long
    watch.stepped(2)
    time.sleep(0.6)
    assert not said
    watch._alive -= 301.0
    while not said:
        time.sleep(0.05)
    watch.close()
    assert "after step 2: process 0 is in a step" in said[0]
    assert not faults


def test_progress_survives_in_place(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.json")
    assert progress.read() is None
    for state in (Reached(10_000_000, 9_999_999, True), Reached(1, None, False)):
        progress.write(state)
        assert Progress(tmp_path / "progress.json").read() == state
    progress.close()


def test_the_two_newest_checkpoints_stay_and_those_of_whole_epochs_where_the_recipe_says_so(tmp_path: Path) -> None:
    train_two_blocks(replace(RECIPE, out=str(tmp_path), keep_every=1), stop_at=14)
    steps = sorted(p.name for p in (tmp_path / "ckpt").glob("step-*"))
    assert steps == ["step-0000010", "step-0000013", "step-0000014"]
