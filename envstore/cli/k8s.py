"""``k8s``: volumes in a cluster, for people: manifests, how the nodes fare, warming them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Group
from envstore.cli.context import Settings
from envstore.cli.params import PrefixType, ref_argument
from envstore.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from envstore.csi.survey import NodeReport
    from envstore.csi.warmup import Outcome, Warmup
    from envstore.store.profiles import Found

_context_option = click.option(
    "--context", metavar="NAME", help="Context of the kubeconfig. Default: the current one."
)
_store_option = click.option(
    "--store-name",
    metavar="NAME",
    default="",
    help="The store by the name that the cluster's administrator gave it, if not the default.",
)
_path_option = click.option(
    "--mount-path",
    "prefix",
    type=PrefixType(),
    default="/opt/envstore",
    show_default=True,
    help="Where pods see it: files are made for this path.",
)
_secret_option = click.option(
    "--secret",
    metavar="NAME",
    default="",
    help="Secret of the pods' namespace with the keys to the store, where it wants them so.",
)
_profile_option = click.option(
    "--profile",
    metavar="NAME",
    default="",
    help="Start profile to fetch ahead; `none` for none. Default: the one that fits.",
)


@click.group(
    cls=Group,
    examples="""
        envstore k8s manifest analysis | kubectl apply -f -
        envstore k8s status
        envstore k8s warm analysis --nodes pool=gpu
    """,
)
def k8s() -> None:
    """Use snapshots as volumes in a Kubernetes cluster.

    The cluster is the one of the kubeconfig, as for kubectl. It needs the driver, which its
    administrator installs (see docs/kubernetes.md).
    """


@k8s.command(
    examples="""
        envstore k8s manifest analysis | kubectl apply -f -
        envstore k8s manifest team/llama:8b --kind job --image registry.example/serve:3
        envstore k8s manifest analysis --kind pvc --namespace science
        envstore k8s manifest analysis --no-pin --mount-path /opt/analysis
    """,
)
@ref_argument()
@click.option(
    "--kind",
    type=click.Choice(("pod", "job", "pvc", "pv")),
    default="pod",
    show_default=True,
    help="pod, job: with the volume in its spec. pvc: a claim and its StorageClass. pv: a claim "
    "and the volume for it.",
)
@click.option("--name", metavar="NAME", help="Name of what is made. Default: made of REF.")
@click.option("--namespace", metavar="NAME", default="", help="Default: left to kubectl.")
@click.option("--image", metavar="IMAGE", help="Image of the container.")
@_path_option
@_store_option
@_secret_option
@_profile_option
@click.option(
    "--fast-path",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    show_default=True,
    help="Let the kernel serve names and local files by itself.",
)
@click.option(
    "--pin/--no-pin",
    default=True,
    help="Name the very snapshot that REF is now (as is usual), or leave it to REF what pods get. "
    "--no-pin needs no store.",
)
@click.pass_obj
def manifest(
    settings: Settings,
    ref: str,
    kind: str,
    name: str | None,
    namespace: str,
    image: str | None,
    prefix: str,
    store_name: str,
    secret: str,
    profile: str,
    fast_path: str,
    pin: bool,
) -> None:
    """Print a manifest that names REF as a volume, for kubectl.

    REF is looked up in your store, and pods get it from the store that the cluster's driver knows
    by --store-name: that must be the same one. `kubectl apply` needs the right to create what is
    printed; a StorageClass or a PersistentVolume takes an administrator.
    """
    from envstore.csi import snippets

    wanted, digest = _resolve(settings, ref) if pin else (_unpinned(ref), "")
    volume = snippets.asked_for(
        wanted,
        digest=digest,
        store=store_name,
        prefix=prefix,
        profile=profile,
        fast_path=fast_path,
    )
    called = name or snippets.name_for(wanted)
    shown = image or snippets.DEFAULT_IMAGE
    wish = snippets.Wish(volume, kind, called, namespace, shown, secret)
    text = snippets.write(wish)
    if settings.json:
        import yaml

        found = {"ref": volume.ref, "digest": digest or None, "name": called}
        output.result({**found, "documents": [*yaml.safe_load_all(text)], "yaml": text})
        return
    output.line(text.rstrip("\n"))


@k8s.command(
    examples="""
        envstore k8s status
        envstore --json k8s status       with every volume on every node
        envstore k8s status && envstore k8s warm analysis --nodes pool=gpu
    """,
)
@click.option(
    "--namespace",
    metavar="NAME",
    default="envstore-system",
    show_default=True,
    help="Where the driver is installed.",
)
@_context_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="How long a node may take to answer.",
)
@click.pass_obj
def status(settings: Settings, namespace: str, context: str | None, timeout: float) -> None:
    """Show how the driver fares on every node.

    Volumes that are mounted, what was fetched from the store, the cache and the share of reads
    that it could serve, restarts of containers and servers. Each node is asked through the API
    server; one that does not answer is shown as such.

    Needs, in the driver's namespace: list daemonsets (apps), list pods, get pods/proxy.

    Exit status: 1 if something is not ready.
    """
    from envstore.csi.cluster import Cluster
    from envstore.csi.survey import survey

    found = survey(Cluster.open(context), namespace, timeout)
    if settings.json:
        nodes = [{**asdict(node), "ready": not node.problems} for node in found.nodes]
        output.result({"ready": found.ready, "nodes": nodes, "problems": found.problems})
    else:
        output.table(
            ("NODE", "STATE", ">MOUNTS", ">FETCHED", "CACHE", ">HITS", ">RESTARTS", "VERSION"),
            [_row(node) for node in found.nodes],
        )
        for problem in found.problems:
            output.line(output.printable(problem))
        for node in found.nodes:
            for problem in node.problems:
                output.line(output.printable(f"{node.node}: {problem}"))
    if not found.ready:
        raise click.exceptions.Exit(1)


def _row(node: NodeReport) -> tuple[str, ...]:
    cache = "-"
    if node.cache_bytes is not None and node.cache_capacity is not None:
        cache = f"{output.size(node.cache_bytes)} of {output.size(node.cache_capacity)}"
    return (
        output.printable(node.node),
        "not ready" if node.problems else "ready",
        "-" if node.mounts is None else f"{node.mounts:,}",
        "-" if node.bytes_fetched is None else output.size(node.bytes_fetched),
        cache,
        "-" if node.hit_rate is None else f"{node.hit_rate:.0%}",
        f"{node.restarts:,}",
        output.printable(node.version or "-"),
    )


@k8s.command(
    examples="""
        envstore k8s warm analysis --nodes pool=gpu
        envstore k8s warm team/llama:8b --nodes gpu=a100,zone=b --whole --timeout 3600
        envstore k8s warm analysis --node worker-3 --node worker-4 --image python:3-slim
    """,
)
@ref_argument()
@click.option("--nodes", "selector", metavar="SELECTOR", help="Labels of nodes, as for kubectl -l.")
@click.option("--node", "names", metavar="NAME", multiple=True, help="A node; may be repeated.")
@click.option(
    "--namespace", metavar="NAME", help="Where the pods run. Default: the context's namespace."
)
@_context_option
@_store_option
@_secret_option
@_path_option
@_profile_option
@click.option("--whole", is_flag=True, help="Read everything, not just what the profile names.")
@click.option("--image", metavar="IMAGE", help="Any image with python3. Default: the driver's.")
@click.option(
    "--driver-namespace",
    metavar="NAME",
    default="envstore-system",
    show_default=True,
    help="Where to look for the driver's image.",
)
@click.option(
    "--timeout",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    default=900,
    show_default=True,
    help="After this the pods are ended.",
)
@click.option(
    "--wait/--no-wait",
    default=True,
    help="Wait until all nodes are warm (as is usual), or leave it to the pods, which remove "
    "themselves.",
)
@click.pass_obj
def warm(
    settings: Settings,
    ref: str,
    selector: str | None,
    names: tuple[str, ...],
    namespace: str | None,
    context: str | None,
    store_name: str,
    secret: str,
    prefix: str,
    profile: str,
    whole: bool,
    image: str | None,
    driver_namespace: str,
    timeout: int,
    wait: bool,
) -> None:
    """Have nodes fetch REF before a job starts there.

    On each node a pod mounts the volume as the job's pods will, and reads what a start reads
    (`envstore profile` records it) or, with --whole, everything. What the driver's policy lets
    your namespace have, it can warm. The pods are removed at the end, also after Ctrl-C.

    Needs, in the namespace of the pods: create, list and delete jobs (batch), list pods and
    events. To choose nodes by --nodes: list nodes. Without --image: get daemonsets (apps) in the
    driver's namespace.

    Exit status: 1 if a node is not warm.
    """
    if bool(selector) == bool(names):
        raise UsageError("name the nodes: either --nodes SELECTOR or --node NAME")
    from envstore.csi import snippets, warmup
    from envstore.csi.cluster import Cluster

    targets = [*dict.fromkeys(map(warmup.check_node, names))]
    wanted, digest = _resolve(settings, ref)
    volume = snippets.asked_for(
        wanted, digest=digest, store=store_name, prefix=prefix, profile=profile
    )
    tasks = None
    if not whole:
        ranges = _profile(settings, ref, digest, profile).profile.ranges
        named = [(item.path, item.offset, item.length) for item in ranges]
        tasks = warmup.fitting(named)
        if len(tasks) < len(named):
            output.note(settings, f"the last {len(named) - len(tasks)} ranges are not waited for")
    cluster = Cluster.open(context)
    away: list[str] = []
    if selector:
        found = warmup.find_nodes(cluster, selector)
        targets, away = found.ready, found.away
        if not targets:
            why = f"{output.counted(len(away), 'node')} not ready" if away else "none fits"
            raise NotFoundError(f"there is no node with {selector!r} to warm: {why}")
    order = warmup.Order(
        volume,
        snippets.check_label(namespace or cluster.namespace, "a namespace"),
        snippets.check_image(image or warmup.driver_image(cluster, driver_namespace)),
        timeout,
        tasks,
        secret and snippets.check_label(secret, "a Secret"),
    )
    running = warmup.Warmup(cluster, order, targets)
    _run(settings, running, wait)
    for node in away:
        running.outcomes.append(warmup.Outcome(node, state="failed", reason="it is not ready"))
    _print_warm(settings, running.outcomes, f"{wanted}@{digest}")


def _run(settings: Settings, running: Warmup, wait: bool) -> None:
    kept = False
    try:
        running.start()
        if wait:
            running.wait(lambda one: _say(settings, one))
        kept = not wait
    finally:
        if not kept:
            running.stop()


def _say(settings: Settings, one: Outcome) -> None:
    if settings.json:
        return
    if one.state == "failed":
        output.note(settings, f"{one.node}: {one.reason}")
        return
    output.note(
        settings,
        f"{one.node}: read {output.size(one.bytes)} of {output.counted(one.files, 'file')} "
        f"in {one.seconds:.1f} s",
    )
    if one.unreadable:
        output.note(
            settings,
            f"{one.node}: {output.counted(one.unreadable, 'file')} not: their modes let no "
            "other user read them",
        )


def _print_warm(settings: Settings, outcomes: list[Outcome], what: str) -> None:
    failed = [one for one in outcomes if one.state == "failed"]
    if settings.json:
        nodes = [asdict(one) for one in outcomes]
        output.result({"ref": what, "warm": not failed, "nodes": nodes})
    else:
        done = sum(one.state == "done" for one in outcomes)
        begun = len(outcomes) - done - len(failed)
        words = [
            f"{output.counted(done, 'node')} warm" if done else "",
            f"begun on {output.counted(begun, 'node')}" if begun else "",
            f"{output.counted(len(failed), 'node')} not warm" if failed else "",
        ]
        output.summary(settings, f"{what.partition('@')[0]}: {', '.join(filter(None, words))}")
    if failed:
        raise click.exceptions.Exit(1)


def _resolve(settings: Settings, ref: str) -> tuple[str, str]:
    """Return the name of REF in full and the digest, in hex, of what it is now."""
    bare, pin, _ = ref.partition("@")
    name = _unpinned(bare)
    with settings.open() as repository:
        snapshot = repository.resolve(ref)
        if pin:
            from envstore.store.lineage import check_lineage

            check_lineage(repository, repository.resolve(name), snapshot, name)
        return name, snapshot.hex()


def _unpinned(ref: str) -> str:
    from envstore.store.refs import RefName

    if not ref:
        raise UsageError("a volume has a name, not only a digest", hint="write NAME@DIGEST")
    if "@" in ref:
        raise UsageError("a REF with a digest is pinned", hint="leave out --no-pin or the digest")
    return str(RefName.parse(ref))


def _profile(settings: Settings, ref: str, digest: str, name: str) -> Found:
    """Return the profile that mounts will follow. Raises ``NotFoundError``."""
    from envstore.store.profiles import NO_PROFILE, find_profile

    if name == NO_PROFILE:
        raise UsageError("without a profile there is nothing to read", hint="or read --whole")
    with settings.open() as repository:
        found = find_profile(repository, bytes.fromhex(digest), name or None)
    if found is None:
        raise NotFoundError(
            f"no start of {ref} was recorded{f' as {name}' if name else ''}",
            hint=f"envstore profile {ref} -- CMD records one; --whole reads everything",
        )
    return found
