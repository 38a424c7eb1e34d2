"""Messages reach the driver in order, each once, however slow the mailbox is."""

from __future__ import annotations

import time

import pytest
import ray

import cnnray.cluster.core.messages as messages_module
from cnnray.cluster.core.messages import Mailbox, MailboxReader, start_mailbox

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class SlowMailbox(Mailbox):
    """Answers after several polls."""

    def take(self):
        time.sleep(1.0)
        return super().take()


def test_what_was_posted_is_shown_in_order_by_the_end():
    mailbox, shown = start_mailbox(), []
    with MailboxReader(mailbox, shown.append):
        for number in range(20):
            ray.get(mailbox.post.remote(f"{number}"))
    assert shown == [f"{number}" for number in range(20)]


def test_an_answer_that_is_late_is_not_lost(monkeypatch):
    monkeypatch.setattr(messages_module, "POLL_SECONDS", 0.1)
    slow = ray.remote(num_cpus=0)(SlowMailbox).remote()
    shown: list[object] = []
    with MailboxReader(slow, shown.append):
        for number in range(3):
            ray.get(slow.post.remote(f"{number}"))
            time.sleep(0.7)
    assert shown == ["0", "1", "2"]
