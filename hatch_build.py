"""Makes the Python modules of envstore/csi/proto whenever envstore is built or installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTOS = "envstore/csi/proto"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles every ``.proto`` there, beside its source: an editable install finds it too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the modules; raises ``RuntimeError`` if a file does not compile."""
        import grpc_tools
        from grpc_tools import protoc

        root = Path(self.root)
        sources = sorted(str(path.relative_to(root)) for path in (root / PROTOS).glob("*.proto"))
        # Paths from the root make the modules import each other by their full names.
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={root}",
                f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
                f"--python_out={root}",
                f"--pyi_out={root}",
                f"--grpc_python_out={root}",
                *sources,
            ]
        )
        if status:
            raise RuntimeError(f"protoc could not compile {', '.join(sources)}")
