from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.csi.cluster import Cluster
from envstore.csi.config import DriverConfig, NamedStore, Rule, single_store
from envstore.csi.credentials import find_credentials
from envstore.csi.here import ClusterHere
from envstore.csi.namespaces import Namespaces
from envstore.csi.policy import NamespaceLabels, Policy
from envstore.csi.refusal import RefusedError
from envstore.csi.request import Pod, VolumeRequest
from envstore.store.objects.credentials import Credentials
from tests.csi.apiserver import ApiServer, running_api_server

STORES = {name: NamedStore(name, f"s3://{name}") for name in ("main", "models")}
WITHIN = 30.0


def policy(*rules: Rule, default: str = "main", labels: NamespaceLabels | None = None) -> Policy:
    config = DriverConfig(STORES, default, rules)
    return Policy(lambda: config, labels)


def request(
    ref: str = "default/env:latest",
    *,
    namespace: str = "team-a",
    account: str = "trainer",
    store: str = "",
) -> VolumeRequest:
    pod = Pod(namespace, "pod-1", "uid-1", account) if namespace else None
    return VolumeRequest(store, ref, pod=pod)


def refused(check: Callable[[], object], code: grpc.StatusCode) -> str:
    with pytest.raises(RefusedError) as caught:
        check()
    assert caught.value.code is code
    assert caught.value.message.isprintable()
    return caught.value.message


def denied(decide: Policy, wanted: VolumeRequest) -> str:
    return refused(
        lambda: decide.check(wanted, WITHIN),
        grpc.StatusCode.PERMISSION_DENIED,
    )


def test_nothing_is_allowed_that_no_rule_allows() -> None:
    assert denied(policy(), request()) == (
        "namespace team-a (service account trainer) may not use default/env:latest of store main:"
        " no rule allows it (an administrator allows it under policy in the configuration of"
        " csi.envstore.dev)"
    )


def test_a_driver_without_configuration_allows_its_one_store_to_all() -> None:
    decide = Policy(lambda: single_store("file:///srv/store"))
    for wanted in (request(), request(namespace=""), request(store="default")):
        assert decide.check(wanted, WITHIN).url == "file:///srv/store"
    denied(decide, request(store="other"))


@pytest.mark.parametrize(
    ("rule", "wanted", "allowed"),
    [
        (Rule(namespaces=("team-*",)), request(), True),
        (Rule(namespaces=("team-*",)), request(namespace="other"), False),
        (Rule(namespaces=("team-?",)), request(namespace="team-ab"), False),
        (Rule(namespaces=("a", "team-a")), request(), True),
        (Rule(namespaces=("*",)), request(namespace=""), False),
        (Rule(service_accounts=("train*",)), request(), True),
        (Rule(service_accounts=("train*",)), request(account="default"), False),
        (Rule(service_accounts=("*",)), request(account=""), False),
        (Rule(stores=("main",)), request(), True),
        (Rule(stores=("main",)), request(store="models"), False),
        (Rule(stores=("*",)), request(store="models"), True),
        (Rule(stores=("*",)), request(namespace=""), True),
        (Rule(refs=("*",)), request(), True),
        (Rule(refs=("default/*",)), request(), True),
        (Rule(refs=("default/env",)), request(), True),
        (Rule(refs=("default/env:latest",)), request(), True),
        (Rule(refs=("default/env:1*",)), request(), False),
        (Rule(refs=("default/env:1*",)), request("default/env:1.2"), True),
        (Rule(refs=("*/env",)), request("team/env:x"), True),
        (Rule(refs=("d*/*",)), request("other/env:latest"), False),
        (Rule(refs=("team/e?v",)), request("team/env:x"), True),
        (Rule(refs=("team/e?v",)), request("team/eenv:x"), False),
        (Rule(refs=("team/env",)), request("team/env2:x"), False),
        (Rule(refs=("Team/*",)), request("team/env:x"), False),
        (Rule(modes=("ro",)), request(), True),
        (Rule(modes=("rw",)), request(), False),
        (Rule(namespaces=("team-a",), refs=("team/*",)), request(), False),
        (Rule(namespaces=("team-a",), stores=("models",)), request(), False),
    ],
)
def test_a_rule_allows_what_fits_all_of_its_conditions(
    rule: Rule, wanted: VolumeRequest, allowed: bool
) -> None:
    decide = policy(rule)
    if allowed:
        assert decide.check(wanted, WITHIN).name == (wanted.store or "main")
    else:
        denied(decide, wanted)


def test_one_rule_that_fits_is_enough() -> None:
    decide = policy(Rule(namespaces=("other",)), Rule(refs=("default/*",)))
    assert decide.check(request(), WITHIN).name == "main"


def test_a_volume_must_name_a_store_where_there_is_no_default() -> None:
    decide = policy(Rule(stores=("*",)), default="")
    message = refused(lambda: decide.check(request(), WITHIN), grpc.StatusCode.INVALID_ARGUMENT)
    assert "store is missing" in message
    assert decide.check(request(store="models"), WITHIN).name == "models"


def test_a_store_that_is_not_there_looks_like_one_that_may_not_be_used() -> None:
    decide = policy(Rule(stores=("main",)))
    there = denied(decide, request(store="models"))
    assert denied(decide, request(store="nothere")) == there.replace("models", "nothere")


def test_a_refusal_says_nothing_of_the_rules() -> None:
    decide = policy(Rule(namespaces=("secret-team",), refs=("secret-project/*",)))
    assert "secret" not in denied(decide, request())


def test_what_is_allowed_may_change_at_any_time() -> None:
    config = DriverConfig(STORES, "main", (Rule(stores=("*",)),))
    decide = Policy(lambda: config)
    assert decide.check(request(), WITHIN).name == "main"
    config = DriverConfig(STORES, "main", ())
    denied(decide, request())


_GLOBS = st.sampled_from(["*", "a*", "?", "a", "ab", "*b"])
_NAMES = st.sampled_from(["a", "ab", "b", "abc", "team"])
_RULES = st.builds(
    Rule,
    namespaces=st.none() | st.lists(_GLOBS, min_size=1, max_size=2).map(tuple),
    service_accounts=st.none() | st.lists(_GLOBS, min_size=1, max_size=2).map(tuple),
    stores=st.none() | st.lists(st.sampled_from(["main", "models", "*"]), min_size=1).map(tuple),
    refs=st.none() | st.lists(st.builds("{}/{}:{}".format, _GLOBS, _GLOBS, _GLOBS)).map(tuple),
)


@given(
    rules=st.lists(_RULES, max_size=3),
    ref=st.builds("{}/{}:{}".format, _NAMES, _NAMES, _NAMES),
    namespace=_NAMES,
    account=_NAMES,
    store=st.sampled_from(["main", "models"]),
)
def test_more_rules_never_allow_less_and_more_conditions_never_more(
    rules: list[Rule], ref: str, namespace: str, account: str, store: str
) -> None:
    wanted = request(ref, namespace=namespace, account=account, store=store)

    def allows(*given: Rule) -> bool:
        try:
            return policy(*given).check(wanted, WITHIN).name == store
        except RefusedError:
            denied(policy(*given), wanted)
            return False

    assert allows(*rules) == any(allows(rule) for rule in rules)
    for rule in rules:
        alone = (
            Rule(namespaces=rule.namespaces),
            Rule(service_accounts=rule.service_accounts),
            Rule(stores=rule.stores),
            Rule(refs=rule.refs),
        )
        assert allows(rule) == all(allows(one) for one in alone)


# --- claims: before there is a pod --------------------------------------------------------------


def test_a_claim_is_judged_by_its_namespace_alone() -> None:
    decide = policy(Rule(namespaces=("team-a",), service_accounts=("trainer",)))
    wanted = request(namespace="")
    assert decide.check_claim(wanted, "team-a", WITHIN).name == "main"
    refused(lambda: decide.check_claim(wanted, "team-b", WITHIN), grpc.StatusCode.PERMISSION_DENIED)


def test_a_claim_of_nobody_knows_is_judged_when_its_pods_come() -> None:
    assert policy().check_claim(request(namespace=""), "", WITHIN).name == "main"


# --- labels of namespaces -----------------------------------------------------------------------

GOLD = Rule(labels=(("tier", ("gold", "silver")),))


@pytest.fixture(scope="module")
def api_server() -> Iterator[ApiServer]:
    with running_api_server() as server:
        yield server


@pytest.fixture
def api(api_server: ApiServer) -> ApiServer:
    api_server.reset()
    api_server.namespaces["team-a"] = {"tier": "gold", "team": "a"}
    api_server.namespaces["team-b"] = {"tier": "bronze"}
    return api_server


@pytest.fixture
def cluster(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Cluster]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    found = ClusterHere.find()
    assert found is not None
    return found


def test_a_rule_with_labels_asks_the_api_server(
    api: ApiServer, cluster: Callable[[], Cluster]
) -> None:
    decide = policy(GOLD, labels=Namespaces(cluster))
    assert decide.check(request(), WITHIN).name == "main"
    denied(decide, request(namespace="team-b"))
    assert api.asked == [
        ("GET", "/api/v1/namespaces/team-a"),
        ("GET", "/api/v1/namespaces/team-b"),
    ]
    assert api.logins == ["Bearer a-token"] * 2


@pytest.mark.parametrize(
    ("labels", "allowed"),
    [
        ({"tier": "gold", "team": "a"}, True),
        ({"tier": "silver", "team": "a", "more": ""}, True),
        ({"tier": "gold"}, False),
        ({"tier": "goldx", "team": "a"}, False),
        ({}, False),
    ],
)
def test_all_labels_of_a_rule_must_fit(
    api: ApiServer,
    cluster: Callable[[], Cluster],
    labels: dict[str, str],
    allowed: bool,
) -> None:
    api.namespaces["team-a"] = labels
    rule = Rule(labels=(("tier", ("gold", "silver")), ("team", ("a",))))
    decide = policy(rule, labels=Namespaces(cluster))
    if allowed:
        assert decide.check(request(), WITHIN).name == "main"
    else:
        denied(decide, request())


def test_nobody_is_asked_where_labels_decide_nothing(
    api: ApiServer, cluster: Callable[[], Cluster]
) -> None:
    decide = policy(
        Rule(labels=GOLD.labels, stores=("models",)),
        Rule(labels=GOLD.labels, namespaces=("x",)),
        Rule(namespaces=("team-a",)),
        GOLD,
        labels=Namespaces(cluster),
    )
    assert decide.check(request(), WITHIN).name == "main"
    denied(policy(GOLD, labels=Namespaces(cluster)), request(namespace=""))
    denied(policy(Rule(labels=GOLD.labels, stores=("models",))), request())
    assert api.asked == []


def test_labels_are_believed_for_a_while(api: ApiServer, cluster: Callable[[], Cluster]) -> None:
    lasting, fleeting = Namespaces(cluster, 3600.0), Namespaces(cluster, 0.0)
    for known in (lasting, fleeting):
        assert policy(GOLD, labels=known).check(request(), WITHIN).name == "main"
    api.namespaces["team-a"]["tier"] = "none"
    assert policy(GOLD, labels=lasting).check(request(), WITHIN).name == "main"
    denied(policy(GOLD, labels=fleeting), request())
    assert len(api.asked) == 3


def test_no_more_namespaces_are_remembered_than_fit(
    api: ApiServer, cluster: Callable[[], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envstore.csi.namespaces._MOST", 2)
    known = Namespaces(cluster, 3600.0)
    api.namespaces["team-c"] = {}
    for name in ("team-a", "team-b", "team-c", "team-c", "team-b", "team-a"):
        known.labels(name, WITHIN)
    assert [path.rpartition("/")[2] for _, path in api.asked] == [
        "team-a",
        "team-b",
        "team-c",
        "team-a",
    ]


def test_a_namespace_that_is_not_there_has_no_labels(
    api: ApiServer, cluster: Callable[[], Cluster]
) -> None:
    del api.namespaces["team-a"]
    denied(policy(GOLD, labels=Namespaces(cluster)), request())


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_an_api_server_that_cannot_tell_does_not_deny(
    api: ApiServer, cluster: Callable[[], Cluster], status: int
) -> None:
    known = Namespaces(cluster, 3600.0)
    api.status = status
    message = refused(
        lambda: policy(GOLD, labels=known).check(request(), WITHIN), grpc.StatusCode.UNAVAILABLE
    )
    assert message.startswith("the labels of namespace team-a are not known: ")
    assert "a-token" not in message
    api.status = 0
    assert policy(GOLD, labels=known).check(request(), WITHIN).name == "main"


@pytest.mark.parametrize("answer", [b"", b"[]", b"no json", b'{"metadata"'])
def test_an_answer_that_is_none_does_not_deny(
    api: ApiServer, cluster: Callable[[], Cluster], answer: bytes
) -> None:
    api.answer = answer
    decide = policy(GOLD, labels=Namespaces(cluster))
    refused(lambda: decide.check(request(), WITHIN), grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("answer", [b"{}", b'{"metadata": 1}', b'{"metadata": {"labels": [1]}}'])
def test_a_namespace_without_labels_has_none(
    api: ApiServer, cluster: Callable[[], Cluster], answer: bytes
) -> None:
    api.answer = answer
    denied(policy(GOLD, labels=Namespaces(cluster)), request())


def test_an_api_server_that_is_silent_does_not_deny(
    api: ApiServer, cluster: Callable[[], Cluster]
) -> None:
    api.gate.clear()
    decide = policy(GOLD, labels=Namespaces(cluster))
    refused(lambda: decide.check(request(), 0.2), grpc.StatusCode.UNAVAILABLE)


def test_a_cluster_that_is_not_there_does_not_deny(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothere"))
    cluster = ClusterHere.find()
    assert cluster is not None
    decide = policy(GOLD, labels=Namespaces(cluster))
    refused(lambda: decide.check(request(), WITHIN), grpc.StatusCode.UNAVAILABLE)


def test_without_api_server_labels_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert ClusterHere.find() is None
    refused(lambda: policy(GOLD).check(request(), WITHIN), grpc.StatusCode.UNAVAILABLE)
    assert policy(GOLD, Rule(stores=("main",))).check(request(), WITHIN).name == "main"


# --- as a pod of a cluster ----------------------------------------------------------------------


def test_in_a_pod_the_pods_service_account_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    certificate = _certificate(tmp_path)
    token = tmp_path / "token"
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    with running_api_server(certificate) as api:
        api.namespaces["team-a"] = {"tier": "gold"}
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        cluster = ClusterHere.find()
        assert cluster is not None
        decide = policy(GOLD, labels=Namespaces(cluster, 0.0))
        message = refused(lambda: decide.check(request(), WITHIN), grpc.StatusCode.UNAVAILABLE)
        assert "no service account" in message
        token.write_text("pods-own-token")
        assert decide.check(request(), WITHIN).name == "main"
        assert api.logins == ["bearer pods-own-token"]


def _certificate(directory: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path = directory / "api.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path),
        ],
        check=True,
        capture_output=True,
    )
    if path.read_text().count("-----BEGIN") != 2:
        pytest.skip("this openssl writes one file only")
    return path


# --- keys to stores -----------------------------------------------------------------------------

KEYS = {"access_key_id": "AKIAXYZ", "secret_access_key": "hunter2"}


def keyed(source: str) -> NamedStore:
    return NamedStore("main", "s3://envs", source)  # type: ignore[arg-type]


def secret(directory: Path, keys: Mapping[str, str | bytes], version: int = 1) -> None:
    """Write a Secret's volume as the kubelet does, for the store ``main``."""
    store = directory / "main"
    data = store / f"..2026_{version}"
    data.mkdir(parents=True)
    for key, value in keys.items():
        (data / key).write_bytes(value if isinstance(value, bytes) else value.encode())
        if version == 1:
            (store / key).symlink_to(f"..data/{key}")
    (store / "..new").symlink_to(data.name)
    (store / "..new").rename(store / "..data")


def test_keys_of_the_node_are_not_the_drivers(tmp_path: Path) -> None:
    assert find_credentials(keyed("node"), tmp_path, {}) is None


def test_keys_of_the_driver_are_read_each_time(tmp_path: Path) -> None:
    store = keyed("secret")
    secret(tmp_path, {**KEYS, "secret_access_key": "hunter2\n"})
    assert find_credentials(store, tmp_path, {}) == Credentials("AKIAXYZ", "hunter2")
    secret(tmp_path, {**KEYS, "session_token": "token"}, 2)
    assert find_credentials(store, tmp_path, {}) == Credentials("AKIAXYZ", "hunter2", "token")


def test_keys_of_the_driver_may_be_plain_files(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for key, value in KEYS.items():
        (tmp_path / "main" / key).write_text(value)
    found = find_credentials(keyed("secret"), tmp_path, {})
    assert found == Credentials("AKIAXYZ", "hunter2")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "no access_key_id"),
        ({"access_key_id": "a"}, "no secret_access_key"),
        ({**KEYS, "access_key_id": ""}, "no access_key_id"),
        ({**KEYS, "secret_access_key": "hunter2 and more"}, "not one word"),
        ({**KEYS, "secret_access_key": b"hunter2\xff"}, "not one word"),
        ({**KEYS, "session_token": "hunter2" * 10_000}, "longer than"),
    ],
)
def test_keys_of_the_driver_that_are_missing_or_broken(
    tmp_path: Path, keys: dict[str, str | bytes], said: str
) -> None:
    secret(tmp_path, keys)
    message = refused(
        lambda: find_credentials(keyed("secret"), tmp_path, {}), grpc.StatusCode.UNAVAILABLE
    )
    assert said in message
    assert "store main" in message
    assert "hunter2" not in message


def test_keys_of_the_driver_without_a_place_for_them(tmp_path: Path) -> None:
    for directory, said in ((None, "without a directory"), (tmp_path / "nothere", "no access_key")):
        message = refused(
            lambda directory=directory: find_credentials(keyed("secret"), directory, {}),  # type: ignore[misc]
            grpc.StatusCode.UNAVAILABLE,
        )
        assert said in message
    (tmp_path / "main" / "access_key_id").mkdir(parents=True)
    message = refused(
        lambda: find_credentials(keyed("secret"), tmp_path, {}), grpc.StatusCode.UNAVAILABLE
    )
    assert "cannot read access_key_id: Is a directory" in message


def test_keys_of_a_volume() -> None:
    store = keyed("volume")
    assert find_credentials(store, None, KEYS) == Credentials("AKIAXYZ", "hunter2")
    whole = {**KEYS, "session_token": "token\n"}
    assert find_credentials(store, None, whole) == Credentials("AKIAXYZ", "hunter2", "token")


@pytest.mark.parametrize(
    ("source", "secrets", "said"),
    [
        ("volume", {}, "nodePublishSecretRef"),
        ("volume", {"aws_access_key_id": "hunter2"}, "holds 'aws_access_key_id', but known are"),
        ("volume", {**KEYS, "endpoint": "http://evil.example"}, "'endpoint'"),
        ("volume", {"access_key_id": "a"}, "no secret_access_key"),
        ("volume", {**KEYS, "secret_access_key": "hunter2 " + "x"}, "not one word"),
        ("node", KEYS, "takes no keys of a volume"),
        ("secret", KEYS, "takes no keys of a volume"),
    ],
)
def test_keys_of_a_volume_that_are_wrong(
    tmp_path: Path, source: str, secrets: dict[str, str], said: str
) -> None:
    secret(tmp_path, KEYS)
    message = refused(
        lambda: find_credentials(keyed(source), tmp_path, secrets),
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    assert said in message
    assert "hunter2" not in message
