from __future__ import annotations

import os
import string

import grpc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from envstore.csi.refusal import RefusedError
from envstore.csi.request import (
    CANONICAL_PREFIX,
    FAST_PATHS,
    KUBERNETES,
    PROVISIONER,
    Pod,
    VolumeRequest,
    parse_request,
    pod_of,
    quoted,
)
from envstore.store.refs import RefName
from envstore.store.relocation import check_prefix

DIGEST = "0123456789abcdef" * 4
POD = {
    KUBERNETES + "pod.namespace": "team-a",
    KUBERNETES + "pod.name": "train-0.worker",
    KUBERNETES + "pod.uid": "5f0c1a1e-8f3c-4a4e-9b57-3a0f1f0f2d11",
    KUBERNETES + "serviceAccount.name": "trainer",
    KUBERNETES + "ephemeral": "true",
}


def refusal(attributes: dict[str, str]) -> str:
    with pytest.raises(RefusedError) as caught:
        parse_request(attributes)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    message = caught.value.message
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_a_ref_alone_is_enough() -> None:
    assert parse_request({"ref": "analysis"}) == VolumeRequest("", "default/analysis:latest")


@pytest.mark.parametrize(
    ("ref", "canonical", "digest"),
    [
        ("a", "default/a:latest", ""),
        ("a:2.5", "default/a:2.5", ""),
        ("team/a", "team/a:latest", ""),
        ("team/a:2.5", "team/a:2.5", ""),
        (f"a@{DIGEST}", "default/a:latest", DIGEST),
        (f"team/a:2.5@{DIGEST}", "team/a:2.5", DIGEST),
    ],
)
def test_a_ref_is_taken_in_every_form_and_kept_in_full(
    ref: str, canonical: str, digest: str
) -> None:
    found = parse_request({"ref": ref})
    assert (found.ref, found.digest) == (canonical, digest)


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "@" + DIGEST,
        "a@",
        "a@" + DIGEST[:12],
        "a@" + DIGEST.upper(),
        "a@" + DIGEST + "@" + DIGEST,
        "a@blake3:" + DIGEST,
        "../a",
        "a/../b",
        "a..b",
        "/a",
        "a/b/c",
        "a:b:c",
        "a b",
        "a\n",
        "a\0",
        "a:" + "b" * 200,
        "a" * 10_000,
        "a\u202eb",
        "s3://bucket/a",
        "-a",
    ],
)
def test_what_is_no_ref_is_refused(ref: str) -> None:
    assert "ref" in refusal({"ref": ref})


def test_a_volume_without_ref_is_refused() -> None:
    assert refusal({}) == "the volume attribute ref is missing"


def test_a_digest_may_be_given_apart_if_it_is_the_same() -> None:
    assert parse_request({"ref": "a", "digest": DIGEST}).digest == DIGEST
    assert parse_request({"ref": f"a@{DIGEST}", "digest": DIGEST}).digest == DIGEST
    assert "not the same" in refusal({"ref": f"a@{DIGEST}", "digest": DIGEST[::-1]})
    for broken in ("", DIGEST[1:], DIGEST.upper(), "g" * 64):
        assert "digest" in refusal({"ref": "a", "digest": broken})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Ref", "is ref meant?"),
        ("fastpath", "is fastPath meant?"),
        ("fast_path", "is fastPath meant?"),
        ("perfix", "is prefix meant?"),
        ("profiles", "is profile meant?"),
        ("endpoint", "known are ref, store, prefix, fastPath, profile, digest"),
        ("bucket", "known are"),
        ("accessKeyId", "known are"),
        ("", "known are"),
        ("csi.storage.k8s.io", "known are"),
        ("x" * 5000, "is not known"),
        ("a\nb\x1b[31m", "'a?b?[31m'"),
    ],
)
def test_an_attribute_that_is_not_known_is_refused(key: str, meant: str) -> None:
    assert meant in refusal({"ref": "a", key: "x"})


def test_too_many_attributes_are_refused_before_they_are_looked_at() -> None:
    assert "more than 64" in refusal({f"key{i}": "" for i in range(100_000)})


def test_what_kubernetes_adds_for_itself_means_nothing() -> None:
    attributes = {
        "ref": "a",
        PROVISIONER: "1700000000000-8081-csi.envstore.dev",
        KUBERNETES + "serviceAccount.tokens": '{"": {"token": "..."}}' * 1000,
        KUBERNETES + "pv/name": "pvc-1",
        KUBERNETES + "ephemeral": "false",
    }
    assert parse_request(attributes) == VolumeRequest("", "default/a:latest")


def test_the_pod_is_as_the_kubelet_says() -> None:
    found = parse_request({"ref": "a", **POD})
    assert found.ephemeral
    assert found.pod == Pod(
        "team-a", "train-0.worker", "5f0c1a1e-8f3c-4a4e-9b57-3a0f1f0f2d11", "trainer"
    )


def test_the_pod_is_known_however_wrong_its_request_is() -> None:
    assert pod_of({"bucket": "x", **POD}) == parse_request({"ref": "a", **POD}).pod
    assert pod_of({"ref": "a"}) is None
    assert pod_of({**POD, KUBERNETES + "pod.name": "../x"}) is None
    assert pod_of({KUBERNETES + "pod.name": "x"}) is None


@pytest.mark.parametrize("missing", ["namespace", "name", "uid"])
def test_half_a_pod_is_refused(missing: str) -> None:
    attributes = {"ref": "a", **POD}
    del attributes[f"{KUBERNETES}pod.{missing}"]
    assert f"pod.{missing} is missing" in refusal(attributes)


def test_a_service_account_without_pod_is_refused() -> None:
    assert "missing" in refusal({"ref": "a", KUBERNETES + "serviceAccount.name": "trainer"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pod.namespace", "Team"),
        ("pod.namespace", "a" * 64),
        ("pod.namespace", "a.b"),
        ("pod.namespace", "../a"),
        ("pod.name", "a/b"),
        ("pod.name", "a" * 254),
        ("pod.uid", "../../etc"),
        ("pod.uid", "a b"),
        ("serviceAccount.name", "system:admin"),
        ("ephemeral", "yes"),
    ],
)
def test_a_pod_that_cannot_be_is_refused(key: str, value: str) -> None:
    assert key in refusal({"ref": "a", **POD, KUBERNETES + key: value})


def test_prefix_fast_path_profile_and_store() -> None:
    found = parse_request(
        {"ref": "a", "prefix": "/opt/x y", "fastPath": "on", "profile": "none", "store": "main-2"}
    )
    assert (found.prefix, found.fast_path, found.profile, found.store) == (
        "/opt/x y",
        "on",
        "none",
        "main-2",
    )
    assert parse_request({"ref": "a"}).prefix == CANONICAL_PREFIX


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefix", ""),
        ("prefix", "/"),
        ("prefix", "//a"),
        ("prefix", "/a/"),
        ("prefix", "/a//b"),
        ("prefix", "/a/./b"),
        ("prefix", "/a/../b"),
        ("prefix", "/.."),
        ("prefix", "a/b"),
        ("prefix", "/a\nb"),
        ("prefix", "/a\0b"),
        ("prefix", "/a\ud800"),
        ("prefix", "/a\u202eb"),
        ("prefix", "/" + "a" * 4095),
        ("prefix", "/" + "\u00e9" * 2048),
        ("fastPath", "true"),
        ("fastPath", "ON"),
        ("fastPath", "x" * 1000),
        ("profile", "../a"),
        ("profile", "a/b"),
        ("profile", "p" * 129),
        ("store", "Main"),
        ("store", "../main"),
        ("store", "s3://bucket"),
        ("store", "a" * 64),
        ("store", ""),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, value: str) -> None:
    assert name in refusal({"ref": "a", name: value})


def test_the_longest_prefix_of_linux_is_taken() -> None:
    prefix = "/" + "a" * 4094
    assert parse_request({"ref": "a", "prefix": prefix}).prefix == prefix


def test_what_is_quoted_is_short_and_printable() -> None:
    assert quoted("a'b") == "'a'b'"
    assert quoted("\u202e\n\x1b\ud800\u00e9") == "'?????'"
    assert quoted("x" * 80) == f"'{'x' * 80}'"
    assert quoted("x" * 81) == f"'{'x' * 77}...'"


@given(
    st.dictionaries(
        st.sampled_from(["ref", "store", "prefix", "fastPath", "profile", "digest", *POD])
        | st.text(max_size=20),
        st.text(max_size=100) | st.sampled_from(["a", "x/y:z", "/a/b", *FAST_PATHS, DIGEST]),
        max_size=12,
    )
)
@example({"ref": "a", "digest": ""})
def test_whatever_is_asked_is_sound_or_refused_in_one_line(attributes: dict[str, str]) -> None:
    try:
        found = parse_request(attributes)
    except RefusedError:
        refusal(attributes)
        return
    name = RefName.parse(found.ref)
    assert found.ref == f"{name.namespace}/{name.name}:{name.tag}"
    assert found.digest == "" or set(found.digest) <= set("0123456789abcdef")
    assert found.prefix != "/"
    assert os.path.normpath(found.prefix) == found.prefix
    check_prefix(os.fsencode(found.prefix))
    assert found.fast_path in FAST_PATHS


_PARTS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=128)


@given(
    namespace=_PARTS,
    name=_PARTS,
    tag=_PARTS,
    digest=st.just("") | st.text("0123456789abcdef", min_size=64, max_size=64),
    prefix=st.lists(st.text(string.ascii_letters + "._- ", min_size=3, max_size=9), min_size=1),
    fast_path=st.sampled_from(FAST_PATHS),
    profile=st.just("") | _PARTS,
    store=st.just("") | st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=63),
)
def test_attributes_mean_the_same_again(
    namespace: str,
    name: str,
    tag: str,
    digest: str,
    prefix: list[str],
    fast_path: str,
    profile: str,
    store: str,
) -> None:
    request = VolumeRequest(
        store,
        f"{namespace}/{name}:{tag}",
        digest,
        "/" + "/".join(prefix),
        fast_path,
        profile,
    )
    assert parse_request(request.attributes()) == request
