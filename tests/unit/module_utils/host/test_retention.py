# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What may go from a host: never what a kept release names or anything uses, and never what is not ours."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host.retention import (
    Content,
    EngineImage,
    Image,
    Link,
    Named,
    Release,
    RetentionError,
    Standing,
    Tree,
    freed,
    freed_by_images,
    plan,
)


def digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def model(name: str, version: int) -> Named:
    return Named("models", name, digest(f"manifest {name} {version}"))


def image(version: int) -> Named:
    return Named("images", "server", digest(f"image {version}"), digest(f"config {version}"))


def loaded(version: int, reference: str = "", **layers: int) -> Image:
    one = image(version)
    return Image(reference or f"server:{version}", one.image_id, one.digest, one.image_id, layers)


def site(versions: int, **more: Any) -> Standing:
    """A host to which so many versions of everything came, one release each; the last one is in force.

    Every version has a model of its own weights and a tokenizer that all of them share.
    """
    there = Standing(current=f"release{versions}", **more)
    for version in range(1, versions + 1):
        wheels = Named("wheels", "server", digest(f"wheels {version}"))
        library = Named("wheels", "host", digest(f"library {version}"))
        artifacts = (model("m", version), wheels, library, image(version))
        there.releases.insert(0, Release(f"release{version}", artifacts, frozenset([wheels.short])))
        there.venvs.append(wheels.short)
        there.libraries.append(library.short)
        for named in artifacts:
            shared = [digest("tokenizer")] if named.kind == "models" else []
            blobs = frozenset([named.digest, digest(f"blob of {named.path}"), *shared])
            layers = frozenset([digest(f"layer {version}")]) if named.kind == "images" else frozenset()
            there.contents[named.digest] = Content(blobs, layers)
            there.blobs |= blobs
            if named.kind != "images":
                there.trees.append(Tree(named.path, True, blobs - {named.digest}))
        there.loaded.append(loaded(version))
        there.shipped = artifacts
        there.library = library.short
    there.engine = [EngineImage(one.id, frozenset([one.reference])) for one in there.loaded]
    return there


def test_what_only_older_releases_name_goes_and_what_is_shared_stays() -> None:
    there = site(4)
    found = plan(there, 2)
    assert found.kept == ["release4", "release3"] and found.releases == ["release2", "release1"]
    assert sorted(found.trees) == sorted(tree.path for tree in there.trees[:6])
    assert digest("tokenizer") not in found.blobs and model("m", 1).digest in found.blobs
    assert [one.reference for one in found.images] == ["server:1", "server:2"]
    assert found.venvs == there.venvs[:2] and found.libraries == there.libraries[:2]
    kept = [there.contents[named.digest].blobs for release in there.releases[:2] for named in release.artifacts]
    assert set(found.blobs) == there.blobs - frozenset().union(*kept)
    assert found.notes == []


def test_nothing_goes_twice() -> None:
    there = site(4)
    found = plan(there, 3)
    there.releases = [one for one in there.releases if one.id not in found.releases]
    there.trees = [tree for tree in there.trees if tree.path not in found.trees]
    there.blobs -= set(found.blobs)
    there.venvs = [name for name in there.venvs if name not in found.venvs]
    there.libraries = [name for name in there.libraries if name not in found.libraries]
    there.engine = [one for one in there.engine or [] if one.id not in [image.id for image in found.images]]
    again = plan(there, 3)
    assert again == type(again)(kept=["release4", "release3", "release2"])


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_the_release_before_the_one_in_force_is_never_given_up(keep: int) -> None:
    with pytest.raises(RetentionError, match="too few to keep"):
        plan(site(3), keep)


def test_the_one_before_is_the_one_that_was_in_force_before_not_the_newest() -> None:
    there = site(4)
    # A rollback from 4 to 1: 1 was put in force last, then 4 before it.
    there.current = "release1"
    there.releases.insert(0, there.releases.pop())
    assert plan(there, 2).kept == ["release1", "release4"]


def test_the_release_in_force_stays_wherever_it_stands_in_the_order() -> None:
    there = site(4)
    there.current = "release1"
    assert plan(there, 2).kept == ["release4", "release1"]
    assert plan(there, 2).releases == ["release3", "release2"]


def test_the_release_that_runs_stays_beyond_the_number() -> None:
    there = site(5, running="release1")
    assert plan(there, 2).kept == ["release5", "release4", "release1"]


def test_a_host_that_was_only_shipped_to_keeps_it() -> None:
    there = site(2)
    there.releases, there.current = [], ""
    found = plan(there, 2)
    assert found.releases == [] and all(model("m", 2).path != path for path in found.trees)
    assert model("m", 1).path in found.trees


def test_what_was_shipped_and_is_not_served_yet_stays() -> None:
    there = site(3)
    there.releases, there.current = there.releases[1:], "release2"
    assert not any(named.path in plan(there, 2).trees for named in there.shipped)


@pytest.mark.parametrize("which", ["current", "running"])
def test_without_knowing_what_a_release_in_use_needs_nothing_goes(which: str) -> None:
    there = site(3)
    setattr(there, which, "release2")
    there.releases[1] = Release("release2", problem="artifacts.json: not JSON")
    with pytest.raises(RetentionError, match=r"cannot be read \(artifacts.json: not JSON\).*serve.yml"):
        plan(there, 2)


def test_a_release_in_force_that_is_gone_is_told() -> None:
    there = site(2)
    there.current = "elsewhere"
    with pytest.raises(RetentionError, match="elsewhere, is not there"):
        plan(there, 2)


def test_an_old_release_that_cannot_be_read_does_not_count_and_goes() -> None:
    there = site(4)
    there.releases[1] = Release("release3", problem="artifacts.json: gone")
    found = plan(there, 2)
    assert found.kept == ["release4", "release2"] and "release3" in found.releases


def test_what_something_uses_stays_with_its_blobs() -> None:
    there = site(3)
    old = model("m", 1)
    there.used = {f"{old.path}/deep/weights.bin": "process 4711", f"venvs/{there.venvs[0]}/bin/python": "process 4712"}
    found = plan(there, 2)
    assert old.path not in found.trees and there.venvs[0] not in found.venvs
    assert not set(found.blobs) & (there.contents[old.digest].blobs | {old.digest})
    assert f"{old.path} stays: process 4711 uses it" in found.notes
    assert f"venvs/{there.venvs[0]} stays: process 4712 uses it" in found.notes


def test_a_name_that_only_begins_alike_is_another_path() -> None:
    there = site(3)
    there.used = {model("m", 1).path + "0": "somebody"}
    assert model("m", 1).path in plan(there, 2).trees


def test_what_shipping_did_not_make_stays() -> None:
    there = site(2)
    there.trees.append(Tree("models/mine/0123456789ab", ours=False))
    found = plan(there, 2)
    assert found.trees == [] and found.notes == ["models/mine/0123456789ab stays: shipping did not make it"]


def test_a_lost_manifest_costs_no_blob_of_its_directory() -> None:
    there = site(3)
    named = model("m", 2)
    blobs = there.contents.pop(named.digest).blobs
    there.blobs -= {named.digest}
    found = plan(there, 2)
    assert named.path not in found.trees and not set(found.blobs) & blobs
    assert found.notes == [f"{named.path} has lost its manifest; it stays, with what its files are links of"]


# --- what is being received -------------------------------------------------------------------------------------------


def test_what_is_being_shipped_stays_and_what_nobody_wants_goes() -> None:
    there = site(2)
    new = model("m", 9)
    there.arriving = (new,)
    there.contents[new.digest] = Content(frozenset([digest("new weights"), digest("new config")]))
    there.blobs |= {new.digest, digest("new config"), digest("nobody's")}
    there.partial = [digest("new weights"), digest("given up")]
    there.packs = ["pack-0001.tar"]
    found = plan(there, 2)
    assert found.blobs == [digest("nobody's")]
    assert found.partial == [digest("given up")] and found.packs == []


def test_as_long_as_a_manifest_is_missing_everything_unfinished_stays() -> None:
    there = site(2)
    there.arriving = (model("m", 9),)
    there.partial, there.packs = [digest("who knows")], ["pack-0001.tar"]
    found = plan(there, 2)
    assert found.partial == [] and found.packs == [] and "have not arrived" in found.notes[0]


def test_where_nothing_is_being_shipped_what_is_unfinished_goes() -> None:
    there = site(2)
    there.partial, there.packs = [digest("given up")], ["pack-0001.tar"]
    found = plan(there, 2)
    assert (found.partial, found.packs) == ([digest("given up")], ["pack-0001.tar"])


def test_layers_on_their_way_to_the_engine_stay_and_older_ones_go() -> None:
    there = site(2)
    there.blobs |= {digest("layer 1"), digest("layer 2")}
    assert plan(there, 2).blobs == [digest("layer 1")]


def test_what_an_interrupted_run_left_goes() -> None:
    assert plan(site(2, leftovers=["models/m/.0123.new"]), 2).leftovers == ["models/m/.0123.new"]


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_image_of_a_container_stays_even_if_that_is_not_ours() -> None:
    there = site(3)
    assert there.engine
    there.engine[0] = EngineImage(there.engine[0].id, there.engine[0].tags, used=True)
    found = plan(there, 2)
    assert found.images == [] and found.notes == ["the image server:1 stays: a container uses it"]


def test_foreign_images_are_not_even_looked_at() -> None:
    there = site(2)
    assert there.engine is not None
    there.engine.append(EngineImage("sha256:other", frozenset(["nginx:1"])))
    there.loaded = []
    assert plan(there, 2).images == []


def test_an_image_that_lost_our_name_to_another_one_stays_unless_it_has_none() -> None:
    there = site(3)
    assert there.engine
    there.engine[0] = EngineImage(there.engine[0].id, frozenset(["somebody:else"]))
    assert plan(there, 2).images == []
    there.engine[0] = EngineImage(there.engine[0].id, frozenset())
    assert [one.reference for one in plan(there, 2).images] == ["server:1"]


def test_images_that_the_engine_has_no_more_are_no_work() -> None:
    there = site(3)
    there.engine = []
    assert plan(there, 2).images == []


def test_without_an_answer_of_the_engine_images_stay() -> None:
    there = site(3)
    there.engine = None
    found = plan(there, 2)
    assert found.images == [] and found.notes == ["images stay: the Docker Engine could not be asked"]
    assert plan(site(2, engine=None), 2).notes == []


def test_an_image_is_known_by_its_configuration_too() -> None:
    there = site(3)
    # The same image, built into another bundle: another manifest, the same configuration.
    there.loaded[0] = Image("server:1", image(3).image_id, digest("other manifest"), there.loaded[0].id)
    assert plan(there, 2).images == []


def test_layers_are_free_when_no_image_has_them_any_more() -> None:
    one, two, three = loaded(1, base=100, one=10), loaded(2, base=100, two=20), loaded(3, base=100)
    engine = [EngineImage(each.id, frozenset([each.reference]), frozenset(each.layers)) for each in (one, two, three)]
    assert freed_by_images([one, two], engine) == [10, 20]
    assert freed_by_images([one, two, three], engine) == [110, 20, 0]
    named = [EngineImage(one.id, frozenset([one.reference, "mine:1"]), frozenset(one.layers))]
    assert freed_by_images([one], named) == [0]
    again = loaded(1, "mine:1", base=100, one=10)
    assert freed_by_images([one, again], named) == [110, 0]


# --- bytes ------------------------------------------------------------------------------------------------------------


def link(name: str, names: int = 1, size: int = 10) -> Link:
    return Link((1, sum(map(ord, name))), names, size)


def test_bytes_are_free_when_every_link_goes() -> None:
    assert freed([[link("a")], [link("b")]]) == [10, 10]
    assert freed([[link("a", 2)], [link("b")]]) == [0, 10]
    assert freed([[link("a", 2)], [link("a", 2)]]) == [10, 0]
    assert freed([[link("a", 3)], [link("a", 3)]]) == [0, 0]
    assert freed([[link("a", 2), link("a", 2)]]) == [10]
    assert freed([]) == []


# --- everything together ----------------------------------------------------------------------------------------------


def any_site(source: random.Random) -> Standing:
    there = site(source.randint(1, 6))
    there.current = source.choice([one.id for one in there.releases])
    source.shuffle(there.releases)
    there.running = source.choice(["", *(one.id for one in there.releases)])
    there.used = {source.choice(there.trees).path: "somebody"} if source.random() < 0.5 else {}
    for named in source.sample(sorted(there.contents), source.randint(0, 2)):
        del there.contents[named]
    there.blobs |= {digest(f"garbage {number}") for number in range(source.randint(0, 3))}
    return there


@pytest.mark.parametrize("seed", range(200))
def test_whatever_a_host_looks_like_nothing_that_is_kept_misses_anything(seed: int) -> None:
    source = random.Random(seed)
    there = any_site(source)
    found = plan(there, source.randint(2, 5))
    gone = {*found.releases, *found.trees, *found.blobs, *found.venvs, *found.libraries}
    assert there.current in found.kept and (not there.running or there.running in found.kept)
    kept = [one for one in there.releases if one.id in found.kept]
    for named in itertools.chain(there.shipped, *(one.artifacts for one in kept)):
        assert not {named.path, named.digest} & gone
        assert not there.contents.get(named.digest, Content(frozenset())).blobs & gone
    for one in kept:
        assert not one.venvs & gone
    for path in there.used:
        assert path not in gone
    still = {tree.path: tree for tree in there.trees if tree.path not in gone}
    assert not any(tree.blobs & gone for tree in still.values())
    assert {digest(f"garbage {number}") for number in range(3)} & there.blobs <= gone


def test_many_blobs_take_no_time() -> None:
    there = site(3)
    many: Dict[str, Content] = {}
    names: List[Tuple[Named, List[str]]] = []
    for number in range(200):
        named = Named("models", f"m{number}", digest(f"many {number}"))
        blobs = [digest(f"many {number} {place}") for place in range(200)]
        names.append((named, blobs))
        many[named.digest] = Content(frozenset(blobs))
        there.trees.append(Tree(named.path, True, frozenset(blobs)))
        there.blobs |= {named.digest, *blobs}
    there.contents.update(many)
    there.shipped += tuple(named for named, _blobs in names[:100])
    assert len(plan(there, 2).trees) == 103
