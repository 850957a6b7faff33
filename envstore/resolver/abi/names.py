"""Names of libraries, and what they stand for."""

from __future__ import annotations

GLIBC = frozenset(
    {
        "libc.so.6",
        "libm.so.6",
        "libmvec.so.1",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
        "libutil.so.1",
        "libresolv.so.2",
        "libanl.so.1",
        "libBrokenLocale.so.1",
        "libthread_db.so.1",
        "libnss_files.so.2",
        "libnss_dns.so.2",
        "libnss_compat.so.2",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
        "ld-linux-armhf.so.3",
        "ld-linux.so.2",
        "ld64.so.1",
        "ld64.so.2",
        "ld-linux-riscv64-lp64d.so.1",
        "linux-vdso.so.1",
        "linux-gate.so.1",
    }
)
"""The C library and its parts: always the machine's own, whatever else lies on the path."""
GCC = frozenset({"libgcc_s.so.1", "libstdc++.so.6"})
"""The run-time libraries of GCC: the machine has them, an environment may bring newer ones."""
PROMISED = GLIBC | GCC
"""What PEP 600 lets every wheel take for granted, and whose symbols all have versions."""
