"""Faults of the disk: full, read-only, slow, and a shared cache that is removed."""

import os
import random
import shutil
import subprocess
import tempfile
import time
from hashlib import md5
from pathlib import Path

from fault import Fault, Place
from process import Command
from stages import Stage

DISK = 32 * 2**20  # bytes of a file system of its own


class SmallDisk(Fault):
    """The folder is a file system of its own."""

    def lacking(self) -> str | None:
        if os.geteuid() or shutil.which("mount") is None:
            return "mounting a small file system needs root"
        return None

    def prepare(self, place: Place) -> None:
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place.folder))

    def clear(self, place: Place) -> None:
        _run("umount", "--lazy", str(place.folder))


class FullDisk(SmallDisk):
    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        left = draws.choice([0, draws.randrange(2**17)])  # none at all, or some of what is still to be written
        free = shutil.disk_usage(place.folder).free
        with (place.folder / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - left))
        command.go_on()

    def lift(self, place: Place) -> None:
        (place.folder / "ballast").unlink(missing_ok=True)


class ReadOnly(Fault):
    """The disk gives up and turns read-only, as ext4 does after an error; then it is mounted anew.

    It is a crash of the disk, too: what nobody had asked to be durable is lost.
    """

    def lacking(self) -> str | None:
        if os.geteuid() or shutil.which("mkfs.ext4") is None:
            return "an ext4 file system of its own needs root and mkfs.ext4"
        with tempfile.TemporaryDirectory() as room:
            place = Place(Path(room), lambda: None)
            place.folder.mkdir()
            try:
                self.prepare(place)
            except RuntimeError as error:
                return str(error)
            self.clear(place)
        return None

    def prepare(self, place: Place) -> None:
        with (place.room / "disk").open("wb") as image:
            image.truncate(DISK)
        _run("mkfs.ext4", "-q", "-F", str(place.room / "disk"))
        _run("mount", "-o", "loop", str(place.room / "disk"), str(place.folder))

    def furnished(self, place: Place, reads: tuple[str, ...]) -> None:
        _run("sync", "--file-system", str(place.folder))

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        _run("mount", "-o", "remount,abort", str(place.folder))
        command.go_on()

    def lift(self, place: Place) -> None:
        _run("umount", str(place.folder))
        _run("mount", "-o", "loop", str(place.room / "disk"), str(place.folder))

    def clear(self, place: Place) -> None:
        _run("umount", "--lazy", str(place.folder))


class SlowDisk(Fault):
    """Every write, fsync, rename and removal takes some milliseconds more, by strace."""

    tracer: subprocess.Popen[bytes] | None = None

    def lacking(self) -> str | None:
        if shutil.which("strace") is None:
            return "no strace, which delays system calls"
        probe = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, check=False)
        return f"strace may not trace here: {probe.stderr.decode().strip()}" if probe.returncode else None

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        calls = "write,pwrite64,fsync,fdatasync,rename,unlink,unlinkat,mkdir,openat"
        delay = draws.choice([1000, 5000, 20000])
        traced = ("-p", str(command.pid), "-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter={delay}")
        self.tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", os.devnull, *traced], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        status = Path(f"/proc/{command.pid}/status")
        while "TracerPid:\t0\n" in status.read_text() and self.tracer.poll() is None:
            time.sleep(0.005)
        command.go_on()

    def lift(self, place: Place) -> None:
        if self.tracer is not None:
            self.tracer.wait(timeout=30)


class Deleted(Fault):
    """What the stage reads are links into a shared cache, which is removed while it reads."""

    def concerns(self, stage: Stage) -> bool:
        return bool(stage.reads)

    def furnished(self, place: Place, reads: tuple[str, ...]) -> None:
        for path in [p for name in reads for p in (place.folder / "data" / name).rglob("*") if p.is_file()]:
            digest = md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            object_ = place.shared / "files" / "md5" / digest[:2] / digest[2:]
            object_.parent.mkdir(parents=True, exist_ok=True)
            path.replace(object_)
            path.symlink_to(object_)
        place.shared.mkdir(exist_ok=True)

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        place.shared.rename(place.room / "removed")
        command.go_on()

    def lift(self, place: Place) -> None:
        if (place.room / "removed").exists():
            (place.room / "removed").rename(place.shared)


def _run(*command: str, check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode
