"""Policies that came to the repository after it was mounted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from cloudfs.core.errors import CloudfsError, Damaged
from cloudfs.repo.history import History
from cloudfs.repo.repository import Repository

log = logging.getLogger(__name__)


class Newcomers:
    """Finds them. What is damaged is passed over, logged once, and looked at again next time."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._said: set[str] = set()

    def find(self, known: Collection[str]) -> Iterator[History]:
        """The histories of policies whose ids are not ``known``.

        One request, and some for each of them. Raises StoreError.
        """
        for record in self._repository.policies(self._complain, known=known):
            try:
                yield History(self._repository, record)
            except Damaged as error:
                self._complain(error)

    def _complain(self, error: CloudfsError) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            log.error("%s", error)
