"""How often were files read? The kernel counts, whichever process reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from inotify_simple import INotify, flags


class ReadCounter:
    """Counts how often each file in a folder is opened; folders made later are not watched.

    The kernel keeps some 16,000 events, two a reading: ``take`` them before there are more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = INotify(nonblocking=True)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        # Equal events in a row are merged into one: with its closing, none follows its like.
        mask = flags.OPEN | flags.CLOSE_NOWRITE
        self.watched = {self.events.add_watch(path, mask): path for path in folders}

    def close(self) -> None:
        self.events.close()

    def take(self) -> Counter[str]:
        """Key → the times that it was opened since the last call. Raises ``OverflowError``."""
        counts = Counter[str]()
        while events := self.events.read(timeout=0):
            for event in events:
                if event.mask & flags.Q_OVERFLOW:
                    raise OverflowError("more files were opened than the kernel has counted")
                if event.mask & flags.OPEN and not event.mask & flags.ISDIR:
                    path = self.watched[event.wd] / event.name
                    counts[str(path.relative_to(self.folder))] += 1
        return counts


class ReadsAfterKills:
    """Whether runs that follow a kill read again only what the killed ones had in their hands."""

    def __init__(self) -> None:
        self.published: set[str] = set()
        self.ever: set[str] = set()
        self.again = 0
        self.in_flight = 0  # the sum over all kills
        self.most_in_flight = 0

    def add(self, reads: Counter[str], published: set[str]) -> list[str]:
        """Add a run: what it read, and what is published now; what is wrong with that."""
        again = self.ever & set(reads)
        self.again += len(again)
        problems = {
            "images of published parts were read again": len(self.published & set(reads)),
            "images were read twice in a run": sum(number > 1 for number in reads.values()),
            "more images were read again than had been in flight": self.again - self.in_flight,
            "published images were never read": len(published - self.ever - set(reads)),
        }
        in_flight = len(set(reads) - published)
        self.in_flight += in_flight
        self.most_in_flight = max(self.most_in_flight, in_flight)
        self.published, self.ever = published, self.ever | set(reads)
        return [f"{number} {what}" for what, number in problems.items() if number > 0]
