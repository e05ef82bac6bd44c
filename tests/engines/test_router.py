"""Which replica a request goes to."""

import pytest

from oel_ray.engines.router import Replica, Router
from oel_ray.errors import EngineUnavailable


def router(count: int) -> Router:
    return Router([Replica(index, handle=None) for index in range(count)])


def test_a_key_stays_where_it_was_served() -> None:
    routes = router(3)
    homes = {key: routes.pick(key, 100).index for key in "abc"}
    assert sorted(homes.values()) == [0, 1, 2]
    for key in "cabbac":
        assert routes.pick(key, 100).index == homes[key]


def test_a_key_leaves_a_replica_that_is_much_busier() -> None:
    routes = router(2)
    assert routes.pick("a", 100).index == 0
    served = [routes.pick("a", 100).index for _ in range(4)]
    assert served == [0, 1, 1, 1]  # 100 <= 2 * 0 + 100, then 200 > 100; from then on its home is 1
    loads = [replica.load for replica in routes.replicas]
    assert loads == [200, 300]
    assert routes.pick("new", 10).index == 0


def test_an_unhealthy_replica_gets_nothing() -> None:
    routes = router(2)
    assert routes.pick("a", 10).index == 0
    routes.replicas[0].healthy = False
    assert [routes.pick(key, 10).index for key in "aab"] == [1, 1, 1]
    routes.replicas[1].healthy = False
    with pytest.raises(EngineUnavailable, match="no healthy engine"):
        routes.pick("a", 10)


def test_the_router_forgets_the_least_recent_keys_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oel_ray.engines.router.REMEMBERED", 3)
    routes = router(1)
    for key in "abcade":
        routes.pick(key, 1)
    assert list(routes._home) == ["a", "d", "e"]
