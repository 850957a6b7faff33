"""``csi check-config``: what a driver's configuration means, before it is applied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings

if TYPE_CHECKING:
    from envstore.csi.config import DriverConfig, Rule

_SOURCES = {
    "node": "the node server's own",
    "secret": "the driver's, in the directory {} of --credentials",
    "volume": "of the Secret that each volume names",
}


@click.command(
    "check-config",
    cls=Command,
    examples="""
        envstore csi check-config deploy/overlays/default/config.yaml
        envstore --json csi check-config config.yaml
    """,
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.pass_obj
def check_config(settings: Settings, file: Path) -> None:
    """Check the configuration of a driver.

    It says what FILE means. Nothing is asked: neither a store nor a cluster. Exit status: 0 if a
    driver would take it, 2 with the place in the file if not.
    """
    from envstore.csi.config import read_config

    config = read_config(file)
    if settings.json:
        output.result(
            {
                "default": config.default or None,
                "stores": [
                    {"name": one.name, "url": one.url, "credentials": one.credentials}
                    for one in config.stores.values()
                ],
                "policy": [_as_json(rule) for rule in config.rules],
            }
        )
        return
    _print(config)


def _print(config: DriverConfig) -> None:
    output.table(
        ("STORE", "URL", "CREDENTIALS"),
        [
            (
                f"{one.name} (default)" if one.name == config.default else one.name,
                output.printable(one.url),
                _SOURCES[one.credentials].format(one.name),
            )
            for one in config.stores.values()
        ],
    )
    if not config.default:
        output.line("no store is the default: each volume must name one")
    for number, rule in enumerate(config.rules, 1):
        output.line(f"rule {number} lets {_who(rule)} read {_what(rule)}")
    output.line("all else is denied" if config.rules else "no rule: everybody is denied")


def _who(rule: Rule) -> str:
    labels = " and ".join(f"{key} = {_any(values)}" for key, values in rule.labels or ())
    said = [
        f"in namespaces {_any(rule.namespaces)}" if rule.namespaces else "",
        f"in namespaces with {labels}" if labels else "",
        f"as service accounts {_any(rule.service_accounts)}" if rule.service_accounts else "",
    ]
    return " ".join(["pods", *filter(None, said)]) if any(said) else "every volume"


def _what(rule: Rule) -> str:
    from envstore.csi.config import EVERYTHING

    refs, stores = rule.refs or (EVERYTHING,), rule.stores or (EVERYTHING,)
    which = "every ref" if EVERYTHING in refs else _any(refs)
    whose = "every store" if EVERYTHING in stores else _any(stores)
    return f"{which} of {whose}"


def _any(words: tuple[str, ...]) -> str:
    return " or ".join(words)


def _as_json(rule: Rule) -> dict[str, object]:
    """Return a rule as it is written in the file."""
    labels = None if rule.labels is None else {key: [*values] for key, values in rule.labels}
    found = {
        "namespaces": rule.namespaces,
        "namespaceLabels": labels,
        "serviceAccounts": rule.service_accounts,
        "stores": rule.stores,
        "refs": rule.refs,
        "modes": rule.modes,
    }
    return {name: value for name, value in found.items() if value is not None}
