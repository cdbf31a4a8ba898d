"""The folder of a run's results. One process uses it at a time, and no file is left incomplete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .. import files
from ..errors import ArgumentError
from .kept import differences, refuse
from .outcome import Outcome
from .settings import NOT_COMPARED, DataSettings, read_toml, to_toml

Record = dict[str, Any]

FOLDERS = ("images", "perturbations", "figures", "records")
FAILED = "failed"  # status of an image that cannot be attacked
NUMBERS = (
    "targets",
    "correct_before",
    "active",
    "active_after_rounding",
    "iterations",
    "perceptibility",
    "perceptibility_after_rounding",
    "num_classes",
    "notes",
)
LONGEST_NAME = 255  # in bytes
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{16}\.part")  # of files.atomic_write


def _ours(path: Path) -> bool:
    """Whether a file may be left over from a run that was killed before it began."""
    return path.name == ".lock" or bool(_TEMPORARY.fullmatch(path.name))


class Folder:
    """The folder of a run's results.

    settings.toml: all settings, and what else the first run depended on.
    images/NAME.png, perturbations/NAME.safetensors, figures/NAME.png: the results of an image.
    records/NUMBER.json: the record of an image. It is written last and marks the image as done.
    images.jsonl: all records, one per line in the order of the images, once they are complete.
    summary.json, speed.json: the summary of all records, and the speed of the run.

    Args:
        out: path of the folder.
        numbers: keys that the record of an attacked image must have.
    """

    def __init__(self, out: Path, numbers: Sequence[str]) -> None:
        self.out, self.numbers = out, numbers
        self.settings = out / "settings.toml"
        self.lines = out / "images.jsonl"
        self.summary = out / "summary.json"
        self.speed = out / "speed.json"
        self.records = out / "records"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs. The lock ends with the process, even if it is killed.

        Raises:
            ValueError: if another run uses the folder, or it is neither new nor that of a run.
            OSError: if the folder cannot be written to or locked.
        """
        files.make_folder(self.out)
        foreign = sorted(path.name for path in self.out.iterdir() if not _ours(path))
        if foreign and not self._is_a_runs():
            raise ArgumentError(
                f"--out must be a new folder or that of a run, {self.out} has {foreign[0]}"
            )
        with open(self.out / ".lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ArgumentError(
                    f"--out {self.out}: another run is using it ({lock.read().strip()}), wait "
                    "for it or choose another folder"
                ) from None
            except OSError as error:
                raise OSError(f"--out {self.out} cannot be locked: {error.strerror}") from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def _is_a_runs(self) -> bool:
        return self.settings.is_file() and bool(read_toml(self.settings, "made_with"))

    def _remove_temporaries(self) -> None:
        """Remove incomplete files that killed processes left behind."""
        for place in (self.out, *(self.out / kind for kind in FOLDERS)):
            for path in place.rglob(".*") if place != self.out else place.glob(".*"):
                if _TEMPORARY.fullmatch(path.name) and path.is_file():
                    path.unlink()

    def begin(
        self, settings: DataSettings, made_with: Mapping[str, Any], versions: Mapping[str, Any]
    ) -> list[str]:
        """Keep the settings, or compare them with those of the results in the folder.

        Args:
            settings: settings of this run.
            made_with: what else the results depend on, in TOML's types.
            versions: versions that the last bits of the results depend on.

        Returns:
            The versions that have changed since, in words.

        Raises:
            ValueError: if settings differ. The message has the old and the new values.
        """
        tables = {"made_with": made_with, "versions": versions}
        if not self.settings.is_file():
            text = to_toml(settings.record(), tables)
            with files.atomic_write(self.settings) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            self._remove_temporaries()
            return []
        had = [read_toml(self.settings, table) for table in (None, *tables)]
        differ = differences(had[0], settings.record(), NOT_COMPARED)
        refuse(self.out, [*differ, *differences(had[1], made_with, NOT_COMPARED)])
        self._remove_temporaries()
        return differences(had[2], versions, NOT_COMPARED)

    def write(
        self, number: int, name: str, outcome: Outcome, record: Record, *, perturbation: bool
    ) -> None:
        """Write the result of an image, its record last."""
        files.write_image(self.path("images", name, "png"), outcome.adversarial)
        if perturbation:
            path = self.path("perturbations", name, "safetensors")
            with files.atomic_write(path) as temporary:
                save_file({"perturbation": outcome.perturbation.contiguous()}, temporary)
        self.write_record(number, record)

    def write_record(self, number: int, record: Record) -> None:
        """Write the record of an image. It replaces the record of an earlier failure."""
        self.records.mkdir(exist_ok=True)
        with files.atomic_write(self.records / f"{number:08d}.json") as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")

    def path(self, kind: str, name: str, ending: str) -> Path:
        """Return the path of a file of an image, and create its folder."""
        self.check_name(name)
        path = self.out / kind / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def keep_only(self, kind: str, paths: Collection[str]) -> None:
        """Remove the files of a kind whose paths in the folder are not in `paths`."""
        for path in (self.out / kind).rglob("*.png"):
            if path.relative_to(self.out).as_posix() not in paths:
                path.unlink()

    def check_name(self, name: str) -> None:
        """Raise ValueError if a name leads out of the folder or is too long."""
        if len(os.fsencode(Path(name).name)) + len(".safetensors") > LONGEST_NAME:
            most = LONGEST_NAME - len(".safetensors")
            raise ArgumentError(f"an image's name must have at most {most} bytes, got {name!r}")
        for folder in (self.out / kind for kind in FOLDERS):
            path = folder / f"{name}.png"
            if ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
                raise ArgumentError(f"an image's name must stay below its folder, got {name!r}")

    def read(self, count: int) -> dict[int, Record]:
        """Read the records that exist for `count` images, by number, in ascending order.

        Raises:
            ValueError: if a file is not one that a run has written.
        """
        found: dict[int, Record] = {}
        for path in [self.lines, *sorted(self.records.glob("*.json"))]:
            if not path.is_file():
                continue
            try:
                for line in path.read_text(encoding="utf-8").splitlines():
                    record = json.loads(line)
                    own = ("reason",) if record["status"] == FAILED else self.numbers
                    absent = [name for name in ("number", "name", *own) if name not in record]
                    if absent or record["number"] not in range(count):
                        what = f"without {absent[0]}" if absent else f"of {count} images"
                        raise ArgumentError(f"number {record.get('number')} {what}")
                    found[record["number"]] = record
            except (KeyError, TypeError, ValueError) as error:
                raise ArgumentError(
                    f"{path} cannot be read as records of a run: {type(error).__name__}: {error}"
                ) from error
        return dict(sorted(found.items()))

    def finish(self, records: Mapping[int, Record], summary: Mapping[str, Any]) -> None:
        """Write all records into one file, and the summary. Then remove the single records."""
        with files.atomic_write(self.lines) as temporary:
            temporary.write_text(
                "".join(json.dumps(record) + "\n" for record in records.values()),
                encoding="utf-8",
            )
        with files.atomic_write(self.summary) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for number in records:
            (self.records / f"{number:08d}.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.records.rmdir()

    def add_speed(self, speed: Mapping[str, Any]) -> None:
        """Append the speed of a finished run since it was last started."""
        try:
            known = json.loads(self.speed.read_text()) if self.speed.is_file() else []
        except ValueError as error:
            raise ArgumentError(f"{self.speed} cannot be read, remove it: {error}") from error
        with files.atomic_write(self.speed) as temporary:
            temporary.write_text(json.dumps([*known, speed], indent=2) + "\n")
