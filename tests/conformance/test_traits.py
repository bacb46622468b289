"""What a wire says about itself (`traits`) is what the table promises, at both ends of a connection."""

from __future__ import annotations

from anywire.contract.traits import Traits

from .marks import holds
from .world import World


@holds("whole messages")
async def test_the_wire_says_what_the_table_says(world: World) -> None:
    channel, _peer = await world.open("send")
    traits, promise = channel.traits, world.promise
    assert isinstance(traits, Traits)
    said = {
        "kind": traits.cells()["kind"],
        "connection": traits.connection,
        "ordered": traits.ordered.split(" (")[0],
        "reliable": traits.promises("reliable"),
        "clean_end": traits.promises("clean_end"),
        "half_close": traits.promises("half_close"),
        "crosses_hosts": traits.crosses_hosts,
    }
    assert said == {name: getattr(promise, name) for name in said}
    # Across hosts by keep-alive, on one host at once: the suite runs on one.
    seen = "at once" if "at once" in traits.sees_death else traits.sees_death.replace("–", "no")
    assert seen == promise.death, traits.sees_death
    words = {"process": "pid", "tls certificate": "certificate"}
    assert words.get(promise.credentials, promise.credentials) in traits.credentials.replace("–", "none")
