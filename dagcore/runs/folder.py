"""The folder of a run's results: one process at a time, every file whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .. import files
from ..aims import Truth
from ..attack_files import make_folder
from ..outcome import Outcome
from .settings import Settings, differences, read_toml, to_toml

Record = dict[str, Any]

_TEMPORARY = re.compile(r"\.\d+-.+")


class Folder:
    """The results of a run.

    settings.toml: all settings, and what they were first used with.
    images/NAME.png, perturbations/NAME.safetensors, figures/NAME.png: what came of an image.
    records/NUMBER.json: the numbers of an image, written last: it is done once this is there.
    images.jsonl: all records, one a line in the order of the images, once all are there.
    summary.json, speed.json: what they come to, and how fast it went.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.settings = out / "settings.toml"
        self.lines = out / "images.jsonl"
        self.summary = out / "summary.json"
        self.speed = out / "speed.json"
        self.records = out / "records"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from the folder; a lock ends with its process, however that ends.

        Raises:
            ValueError: a folder that another run is at work in, or that is not a run's.
            OSError: one that cannot be written to.
        """
        make_folder(self.out)
        own = (".lock", self.settings.name)
        foreign = [p.name for p in self.out.iterdir() if not _TEMPORARY.fullmatch(p.name)]
        if foreign and not any(name in own for name in foreign):
            raise ValueError(f"--out must be a new folder or a run's, {self.out} has {foreign[0]}")
        with open(self.out / ".lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ValueError(
                    f"--out {self.out}: another run is at work there ({lock.read().strip()}), wait "
                    "for it or choose another folder"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            self._remove_temporaries()
            yield

    def _remove_temporaries(self) -> None:
        """Remove what processes that were killed have left half-written."""
        for path in self.out.rglob(".*"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()

    def begin(
        self, settings: Settings, made_with: Mapping[str, Any], versions: Mapping[str, Any]
    ) -> list[str]:
        """Keep the settings, or see that they are those of the results that are there.

        Args:
            settings: those of this run.
            made_with: what else results follow from, in TOML's types.
            versions: what they follow from in their last bits.

        Returns:
            Versions that have changed since, in words.

        Raises:
            ValueError: other settings, each with its old and its new value.
        """
        tables = {"made_with": made_with, "versions": versions}
        text = to_toml(settings.record(), tables)
        if not self.settings.is_file():
            with files.whole(self.settings) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return []
        had = [read_toml(self.settings, table) for table in (None, *tables)]
        differ = [*differences(had[0], settings.record()), *differences(had[1], made_with)]
        if differ:
            raise ValueError(
                f"--out {self.out} has results of other settings: {'; '.join(differ)}. Choose "
                "another folder, or the old settings"
            )
        return differences(had[2], versions)

    def write(
        self, number: int, name: str, outcome: Outcome, record: Record, *, perturbation: bool
    ) -> None:
        """Write what came of an image, its record last."""
        files.write_image(self.path("images", name, "png"), outcome.adversarial)
        if perturbation:
            path = self.path("perturbations", name, "safetensors")
            with files.whole(path) as temporary:
                save_file({"perturbation": outcome.perturbation.contiguous()}, temporary)
        self.write_record(number, record)

    def write_record(self, number: int, record: Record) -> None:
        """Write the record of an image."""
        self.records.mkdir(exist_ok=True)
        with files.whole(self.records / f"{number:08d}.json") as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")

    def path(self, kind: str, name: str, ending: str) -> Path:
        """A file of an image, its folder made.

        Raises:
            ValueError: a name that leads out of the folder.
        """
        folder = self.out / kind
        path = folder / f"{name}.{ending}"
        if ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"an image's name must stay below its folder, got {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self) -> set[int]:
        """The numbers of the images that have a record."""
        if self.lines.is_file():
            return {record["number"] for record in self.read()}
        return {int(path.stem) for path in self.records.glob("[0-9]*.json")}

    def read(self) -> list[Record]:
        """All records, in the order of the images.

        Raises:
            ValueError: a file that is not as a run has left it.
        """
        path = self.lines
        try:
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                return [json.loads(line) for line in lines]
            found = []
            for path in sorted(self.records.glob("[0-9]*.json")):
                found.append(json.loads(path.read_text(encoding="utf-8")))
            return found
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as records of a run: {error}") from error

    def finish(self, records: Sequence[Record], summary: Mapping[str, Any]) -> None:
        """Write all records as lines, and the summary; then single ones are of no more use."""
        if not self.lines.is_file():
            with files.whole(self.lines) as temporary:
                temporary.write_text(
                    "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
                )
        with files.whole(self.summary) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for path in self.records.glob("*.json"):
            path.unlink()
        with contextlib.suppress(OSError):
            self.records.rmdir()

    def add_speed(self, session: Mapping[str, Any]) -> None:
        """Keep how fast one session of the run went, after those before."""
        sessions = json.loads(self.speed.read_text()) if self.speed.is_file() else []
        with files.whole(self.speed) as temporary:
            temporary.write_text(json.dumps([*sessions, session], indent=2) + "\n")


def truth_record(truth: Truth) -> Record | None:
    """True boxes, ready for JSON."""
    if not isinstance(truth, Mapping):
        return None
    return {name: value.tolist() for name, value in truth.items()}
