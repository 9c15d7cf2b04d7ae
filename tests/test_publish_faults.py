"""Publishing when something goes wrong: a sample of `benchmarks/publish_faults.py`, kills, and two publishers at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hub.campaign import REPO, Campaign, Case, publish
from tests.hub.faults import Kind
from tests.hub.merges import OPTIONS, sources, tiny_merges
from tests.hub.runner import CLIENT, PUBLISHER, Done, Runner
from tests.hub.server import State
from tests.hub.ways import WAYS, Name


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Arguments of `mechmerge publish` for an older merge and a newer one."""
    return [[str(folder), *OPTIONS] for folder in tiny_merges(tmp_path_factory.mktemp("merges"))]


@pytest.fixture(scope="module", params=["lfs", "xet"])
def campaign(
    request: pytest.FixtureRequest, merges: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("campaign"), *merges, xet=request.param == "xet") as made:
        yield made


SAMPLE: dict[bool, tuple[Kind, ...]] = {
    False: ("cut", "half", "lost", "truncated", "expired", "kill"),
    True: ("cut", "error", "lost", "busy", "push", "kill"),
}
"""Kinds of the cases that are drawn in LFS mode and in xet mode; the full campaign has all, at every request."""


def test_main_survives_every_fault_of_a_sample(campaign: Campaign) -> None:
    draw, cases = random.Random(6), list(campaign.cases())
    for kind in SAMPLE[campaign.hub.xet]:
        verdict = campaign.run(draw.choice([case for case in cases if case.kind == kind]))
        assert verdict.struck, str(verdict.case)
        assert not verdict.problems, f"{verdict.case}: {verdict.problems}"


@pytest.mark.parametrize(("way", "kind"), [("branch", "kill"), ("pr", "lost"), ("direct", "lost"), ("scores", "half")])
def test_so_does_every_other_way_to_publish(way: Name, kind: Kind, tmp_path: Path) -> None:
    """One fault each, at a commit of the second publication, where most can go wrong."""
    (states,) = sources(tmp_path, [way]).values()
    with Campaign(tmp_path / "campaign", *states, xet=False, way=WAYS[way]) as campaign:
        start = campaign.start(False)
        at = [index for index, (request, _) in enumerate(start.requests) if "/commit/" in request]
        verdict = campaign.run(Case(False, False, kind, at[-1], start.requests[at[-1]][0], way))
    assert verdict.struck, str(verdict.case)
    assert not verdict.problems, f"{verdict.case}: {verdict.problems}"


class Careless(Campaign):
    """Publishes as many scripts do: file by file, straight to main."""

    CODE = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
api, repo = HfApi(), "writer/merge"
api.create_repo(repo, exist_ok=True)
model = Path(sys.argv[1])
for path in sorted(path for path in model.rglob("*") if path.is_file()):
    api.upload_file(repo_id=repo, path_or_fileobj=path.read_bytes(), path_in_repo=str(path.relative_to(model)))
"""

    def publish(self, arguments: Sequence[str]) -> Done:
        return self.runner.python(self.CODE, arguments[0])


def test_the_campaign_notices_a_careless_publisher(merges: list[list[str]], tmp_path: Path) -> None:
    """What the campaign asserts can fail: the same checks find a half-written main, and more than one commit."""
    with Careless(tmp_path, *merges, xet=False, imports=CLIENT) as careless:
        commits = [index for index, (request, _) in enumerate(careless.start(False).requests) if "/commit/main" in request]
        assert len(commits) > 2
        verdict = careless.run(Case(False, False, "kill", commits[1], "a commit in the middle"))
    assert verdict.struck
    assert any("neither the old nor the new" in problem for problem in verdict.main_broken)
    assert any("commits of ours" in problem for problem in verdict.rerun_failed)


def test_killed_three_times_at_random_moments(campaign: Campaign) -> None:
    """SIGKILL at moments that no request marks; what was staged stays, and the last run finishes."""
    start, draw = campaign.start(False), random.Random(3)
    campaign.hub.restore(start.state)
    began = time.monotonic()
    assert campaign.publish(campaign.new).code == 0
    duration, kills = time.monotonic() - began, 0
    campaign.hub.restore(start.state)
    while kills < 3:
        timer = threading.Timer(draw.uniform(0.1, 0.9) * duration, campaign.runner.kill)
        timer.start()
        done = campaign.publish(campaign.new)
        timer.cancel()
        campaign.hub.wait_until_idle()
        main = campaign.main()
        if done.code == 0:  # faster than the clock: once more
            assert main == start.new
            campaign.hub.restore(start.state)
            kills = 0
            continue
        assert done.code == -9, done.err
        assert main in (start.old, start.new)
        kills += 1
    assert campaign.check_second(start, campaign.publish(campaign.new)) == []
    assert campaign.check_store(start) == []


@pytest.fixture(scope="module")
def second(campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Another client of the campaign's Hub."""
    folder = tmp_path_factory.mktemp("second")
    with Runner(campaign.hub.env(home=folder / "home"), folder / "output", PUBLISHER) as runner:
        yield runner


def at_once(campaign: Campaign, second: Runner, one: Sequence[str], other: Sequence[str]) -> list[Done]:
    """Two processes that publish to the same repository at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda task: publish(*task), [(campaign.runner, one), (second, other)]))


def alone(campaign: Campaign, start: State, arguments: Sequence[str]) -> dict[str, str]:
    """What a repository holds after one publication that nobody disturbs."""
    campaign.hub.restore(start)
    assert campaign.publish(arguments).code == 0
    return campaign.hub.files(REPO)


def test_of_two_publishers_one_wins_and_the_other_plans_again(campaign: Campaign, second: Runner) -> None:
    hub, start, merges = campaign.hub, State({}, None), (campaign.old, campaign.new)
    expected = [alone(campaign, start, arguments) for arguments in merges]
    assert expected[0] != expected[1]
    hub.restore(start)
    # Both stand before their last commit, planned on the same parent, when either is carried out.
    meeting = threading.Barrier(2)
    hub.faults.add("hold", method="POST", pattern="/commit/main$", times=2, act=lambda: meeting.wait(60))
    done = at_once(campaign, second, *merges)
    assert sorted(each.code for each in done) == [0, 2], [each.err for each in done]
    winner, loser = (0, 1) if done[0].code == 0 else (1, 0)
    assert "plan again" in done[loser].err
    assert campaign.main() == hub.files(REPO) == expected[winner]
    assert publish(campaign.runner, merges[loser]).code == 0
    assert campaign.main() == expected[loser]
    assert [commit.author for commit in hub.commits(REPO)[:2]] == ["writer", "writer"]
    assert hub.repositories["models", REPO].heads.keys() == {"main"}


def test_two_publishers_of_the_same_state_make_one_commit(campaign: Campaign, second: Runner) -> None:
    """They share the staging branch, and neither knows of the other."""
    start = campaign.start(False)
    campaign.hub.restore(start.state)
    done = at_once(campaign, second, campaign.new, campaign.new)
    assert 0 in [each.code for each in done], [each.err for each in done]
    assert campaign.main() == start.new
    assert campaign.check_second(start, campaign.publish(campaign.new)) == []
